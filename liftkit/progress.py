"""How long work reports on itself, without knowing who listens."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

Advance = Callable[[float], None]


class Observer(Protocol):
    """Listens to long work: the command line draws bars, tests keep a list, the default is silent."""

    def stage(self, title: str, total: float | None, unit: str) -> AbstractContextManager[Advance]:
        """A stage begins; the block reports how much was done. ``unit`` is ``images``, ``bytes`` or ``steps``."""

    def note(self, text: str) -> None:
        """Something worth a line."""

    def status(self, text: str) -> None:
        """How the stage stands, in a few words that replace the last ones."""


class Silent:
    """Shows nothing."""

    @contextmanager
    def stage(self, title: str, total: float | None, unit: str) -> Iterator[Advance]:
        """See :class:`Observer`."""
        yield lambda amount: None

    def note(self, text: str) -> None:
        """See :class:`Observer`."""

    def status(self, text: str) -> None:
        """See :class:`Observer`."""


def first_process() -> bool:
    """True in a run's only process, and in the first one of a launch of several (``RANK`` 0), which speaks and writes for all."""
    return os.environ.get("RANK", "0") == "0"


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
