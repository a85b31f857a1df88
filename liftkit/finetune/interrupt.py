"""Ctrl-C, SIGTERM and SIGHUP in the middle of a run."""

from __future__ import annotations

from contextlib import ExitStack
from types import FrameType
from typing import Any

from liftkit.interrupt import Stopped, listening


class Interrupt:
    """A signal once: finish the step, save and stop. Twice: at once.

    Attributes:
        number: of the first signal; None before there is one.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._stack = ExitStack()
        self._before: dict[int, Any] = {}

    @property
    def arrived(self) -> bool:
        """Whether there was a signal."""
        return self.number is not None

    def __enter__(self) -> Interrupt:
        self._before = self._stack.enter_context(listening(self._receive))
        return self

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.number is None:
            self.number = number
            return
        before = self._before.get(number)
        if callable(before):
            before(number, frame)
        raise Stopped(number)

    def __exit__(self, *_: Any) -> None:
        self._stack.close()
