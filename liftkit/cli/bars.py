"""Progress of long work: a line that stands still in a terminal, and plain lines now and then where there is none.

What matters first comes first: how much of it is done, how long that took and how long the rest will take. What a stage says
of itself comes after, and is cut from the right where a terminal is narrow.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Lock, Thread

from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

from liftkit.checkpoint.text import printable
from liftkit.progress import Advance, size

EVERY = 15.0
"""Seconds between plain lines; as long a wait for slow work to advance is a line too."""
POLL = 1.0
"""Seconds between looks at the clock of a heartbeat."""
SOON = 2.0
"""Seconds until the first one."""
WINDOW = 30.0
"""Seconds over which a rate is taken."""
BAR = 20
_FRAMES = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"


class Stage:
    """How far one stage is.

    Args:
        title: what is done.
        total: how much there is to do; None if nobody knows.
        unit: of it, such as ``steps``; ``bytes`` are printed as sizes.
        clock: seconds that never go back.
    """

    def __init__(self, title: str, total: float | None, unit: str, clock: Callable[[], float]) -> None:
        self.title, self.total, self.unit, self.clock = printable(title), total, printable(unit), clock
        self.done = 0.0
        self.status = ""
        self.ended = False
        self.began = clock()
        self._samples: deque[tuple[float, float]] = deque()

    def advance(self, amount: float) -> None:
        """So much more is done."""
        self.done += amount
        now = self.clock()
        self._samples.append((now, self.done))
        while len(self._samples) > 2 and self._samples[1][0] < now - WINDOW:
            self._samples.popleft()

    @property
    def rate(self) -> float | None:
        """What is done in a second, lately: None until it was seen twice. What a resumed run had done at once does not count."""
        if len(self._samples) < 2:
            return None
        (first, before), (last, after) = self._samples[0], self._samples[-1]
        return (after - before) / (last - first) if last > first else None

    @property
    def left(self) -> float | None:
        """Seconds that the rest will take, if that can be known."""
        if self.total is None or not self.rate:
            return None
        return max(0.0, self.total - self.done) / self.rate

    def facts(self) -> str:
        """Done of total, and the times."""
        show = size if self.unit == "bytes" else lambda value: f"{value:.0f}"
        # A stage that had enough before its end is done all the same.
        whole = self.total is not None and (not self.ended or self.done >= self.total)
        done = show(self.done) + (f"/{show(self.total)}" if whole and self.total is not None else "")
        parts = [
            done + ("" if self.unit == "bytes" else f" {self.unit}"),
            f"{clock_text(self.clock() - self.began)} elapsed",
        ]
        if self.total is not None and not self.ended:
            parts.append(f"{clock_text(self.left)} left")
        return "  ".join(parts)

    def more(self) -> str:
        """The rate, and what the stage says of itself."""
        rate = self.rate
        if not rate:
            return self.status
        # Slow work is counted by the minute: 0.02 steps/s says little.
        per, word = (rate, "s") if rate >= 1 or self.unit == "bytes" else (60 * rate, "min")
        shown = f"{size(per)}/{word}" if self.unit == "bytes" else f"{per:.1f} {self.unit}/{word}"
        return "  ".join(part for part in (shown, self.status) if part)

    def plain(self) -> str:
        """All of it on one line."""
        return "  ".join(part for part in (self.title, self.facts(), self.more()) if part)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The line, as wide as the terminal at most."""
        mark = "✓" if self.ended else _FRAMES[int(self.clock() * 10) % len(_FRAMES)]
        facts = self.facts()
        room = options.max_width - cell_len(facts) - 4
        title = self.title if cell_len(self.title) <= room else set_cell_size(self.title, max(room - 1, 0)) + "…"
        line = Text.assemble((mark, "green" if self.ended else "cyan"), f" {title}  ", facts)
        more = printable(self.more())
        if self.total and options.max_width >= line.cell_len + BAR + 4 + cell_len(more):
            full = round(BAR * min(1.0, self.done / self.total))
            line.append("  ")
            line.append("━" * full, "green" if self.ended else "cyan")
            line.append("━" * (BAR - full), "dim")
        if more and options.max_width >= line.cell_len + 6:
            line.append(f"  {more}", "dim")
        line.no_wrap = True
        line.truncate(options.max_width, overflow="ellipsis")
        yield line


class Bars:
    """An observer that prints how far each stage is.

    Args:
        console: to print on.
        note: prints a line that is no progress.
        quiet: print nothing.
        clock: seconds that never go back.
        every: seconds between plain lines, where the console is no terminal.
    """

    def __init__(
        self,
        console: Console,
        note: Callable[[str], None],
        quiet: bool = False,
        clock: Callable[[], float] = time.monotonic,
        every: float = EVERY,
    ) -> None:
        self.console, self.note, self.quiet, self.clock, self.every = console, note, quiet, clock, every
        self._stage: Stage | None = None

    @contextmanager
    def stage(self, title: str, total: float | None, unit: str) -> Iterator[Advance]:
        """See :class:`liftkit.progress.Observer`."""
        stage = self._stage = Stage(title, total, unit, self.clock)
        show = self._live if self.console.is_terminal else self._lines
        try:
            with show(stage) if not self.quiet else _unseen(stage) as advance:
                yield advance
                stage.ended = True
        finally:
            self._stage = None

    def status(self, text: str) -> None:
        """See :class:`liftkit.progress.Observer`."""
        if self._stage is not None:
            self._stage.status = text

    @contextmanager
    def _live(self, stage: Stage) -> Iterator[Advance]:
        with Live(console=self.console, get_renderable=lambda: stage, refresh_per_second=10):
            yield stage.advance

    @contextmanager
    def _lines(self, stage: Stage) -> Iterator[Advance]:
        lines, over = PlainLines(stage, self.console, self.every), Event()

        def watch() -> None:
            while not over.wait(min(POLL, self.every)):
                lines.beat()

        Thread(target=watch, name="heartbeat", daemon=True).start()
        try:
            yield lines.advance
        finally:
            over.set()
            lines.end()


class PlainLines:
    """Lines of one stage: soon after it begins, then now and then, at the latest by a heartbeat, and at its end.

    Args:
        stage: whose clock counts.
        console: to print on.
        every: seconds between lines.
    """

    def __init__(self, stage: Stage, console: Console, every: float) -> None:
        self.stage, self.console, self.every = stage, console, every
        self._last, self._due = stage.began, stage.began + min(SOON, every)
        self._shown, self._over = -1.0, False
        self._lock = Lock()

    def advance(self, amount: float) -> None:
        """So much more is done; a line if one is due."""
        with self._lock:
            self.stage.advance(amount)
            if self.stage.clock() >= self._due:
                self._print()
                self._shown = self.stage.done

    def beat(self) -> None:
        """A line if the last one is long ago, though nothing advanced."""
        with self._lock:
            if not self._over and self.stage.clock() >= self._last + self.every:
                self._print()

    def end(self) -> None:
        """The last line, unless it would repeat that of the last advance; no heartbeat comes after it."""
        with self._lock:
            self._over = True
            if self.stage.done != self._shown:
                self._print()

    def _print(self) -> None:
        self._last = self.stage.clock()
        self._due = self._last + self.every
        self.console.print(self.stage.plain())


@contextmanager
def _unseen(stage: Stage) -> Iterator[Advance]:
    yield stage.advance


def clock_text(seconds: float | None) -> str:
    """A span of time, such as ``1:05`` or ``2:03:00``; dashes where nobody knows it."""
    if seconds is None:
        return "-:--"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
