"""The last thing before the terminal: whatever is printed, names out of files cannot move its cursor or change its title."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import IO, Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from liftkit.checkpoint.text import printable

_COLOR = re.compile(r"(\x1b\[[0-9;]*m)")


class SafeConsole(Console):
    """A console that takes text for text: no markup in it, and control characters as their escapes.

    Colors and movements that rich makes itself are not part of the text, and stay.
    """

    def __init__(self, **choices: Any) -> None:
        super().__init__(highlight=False, soft_wrap=True, emoji=False, markup=False, **choices)

    @property
    def file(self) -> IO[str]:
        """Where it writes: what it prints is safe already, and passes the guard."""
        file = super().file
        return file.under if isinstance(file, Guarded) else file

    @file.setter
    def file(self, new: IO[str]) -> None:
        self._file = new

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """The pieces of what is printed."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else printable(text), style, control)


class Guarded:
    """A stream for the prints of libraries: control characters become their escapes; colors may pass to a terminal.

    Args:
        under: the stream that it writes to.
    """

    def __init__(self, under: IO[str]) -> None:
        self.under = under

    def write(self, text: str) -> int:
        """Write text, and say how much of it that was."""
        if not isinstance(text, str):
            # How others find out that a stream takes no bytes.
            raise TypeError(f"expected text, found {type(text).__name__}")
        pieces = _COLOR.split(text) if self.under.isatty() else [text]
        # Every second piece is what the pattern found.
        self.under.write("".join(piece if index % 2 else printable(piece) for index, piece in enumerate(pieces)))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write several texts."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.under, name)


@contextmanager
def guarded() -> Iterator[None]:
    """Guard what anybody prints in the block, on stdout and stderr."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Guarded(sys.stdout), Guarded(sys.stderr)  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
