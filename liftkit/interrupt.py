"""Signals that ask a program to end: Ctrl-C, SIGTERM (schedulers, ``docker stop``) and SIGHUP (a terminal that closes)."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

ENDING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
Handler = Callable[[int, FrameType | None], Any]


class Stopped(KeyboardInterrupt):
    """A signal asks the program to end.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def exit_code(number: int | None) -> int:
    """The exit code of a program that a signal ended: 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP.

    Args:
        number: of the signal; None for an end that was asked for without one, which counts as Ctrl-C.
    """
    return 128 + (signal.SIGINT if number is None else number)


def stopped_by(error: BaseException | None) -> int | None:
    """The number of the signal that an exception, or one that it came from, stands for; None if none does."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, Stopped):
            return error.number
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


@contextmanager
def listening(handler: Handler) -> Iterator[dict[int, Any]]:
    """Have a handler called for each ending signal in the block; those that are ignored stay so, as under ``nohup``.

    Outside of the main thread nobody can be interrupted, and nothing changes.

    Yields:
        The handlers of before, by signal.
    """
    before: dict[int, Any] = {}
    try:
        for number in ENDING:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, handler)
    except ValueError:
        pass
    try:
        yield before
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
