"""The last thing before the terminal: whatever is printed, names out of files cannot move its cursor or change its title."""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
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


class Sturdy:
    """A stream whose reader may go away, whose disk may fill and whose encoding may not know a character: the work goes on.

    Args:
        under: the stream that it writes to.

    Attributes:
        error: why it prints no more, in words; None if it does, or where the reader of a pipe has gone.
    """

    def __init__(self, under: IO[str]) -> None:
        self.under = under
        self.error: str | None = None
        self._closed = False
        if isinstance(under, io.TextIOWrapper):
            under.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        """Write text, and say how much of it that was; nothing is written any more once that failed."""
        self._attempt(lambda: self.under.write(text))
        return len(text)

    def flush(self) -> None:
        """Hand on what was written."""
        self._attempt(self.under.flush)

    def _attempt(self, act: Callable[[], Any]) -> None:
        if self._closed:
            return
        try:
            act()
        except OSError as error:
            self._closed = True
            self.error = None if isinstance(error, BrokenPipeError) else error.strerror or str(error)
            # What is in its buffer still would fail again at the end of the program.
            with suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self.under.fileno())
                os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.under, name)


@contextmanager
def guarded() -> Iterator[None]:
    """Guard what anybody prints in the block, on stdout and stderr; a stream that is closed stays so."""
    before = sys.stdout, sys.stderr
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None:
            setattr(sys, name, Guarded(Sturdy(stream)))  # type: ignore[arg-type]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def lost() -> str | None:
    """Why stdout could not take everything, in words; None if it could, or nobody reads it any more."""
    stream = sys.stdout
    if stream is None:
        return None
    stream.flush()
    under = getattr(stream, "under", None)
    return under.error if isinstance(under, Sturdy) else None
