"""What the commands print with: one console for results, one for progress and complaints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from liftkit.progress import Advance


@dataclass
class Settings:
    """Choices that hold for the whole run."""

    debug: bool = False


settings = Settings()
out = Console(highlight=False, soft_wrap=True, emoji=False)
err = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)


def quiet_libraries() -> None:
    """Our bars and lines say what matters: no notices, bars and warnings of the libraries below."""
    import warnings

    from diffusers.utils import logging

    if not settings.debug:
        warnings.simplefilter("ignore")
        logging.set_verbosity_error()
    logging.disable_progress_bar()


def fail(message: str) -> None:
    """One line on stderr."""
    err.print(f"[bold red]error[/]: {escape(message)}")


def note(message: str) -> None:
    """One line on stderr, not an error."""
    err.print(f"[yellow]note[/]: {escape(message)}")


def table(title: str, rows: list[tuple[str, str]]) -> None:
    """Two columns under a title."""
    grid = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None, pad_edge=False)
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for key, value in rows:
        grid.add_row(key, escape(value))
    out.print(grid)
    out.print()


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


class _Rate(ProgressColumn):
    """Done of total, and the rate, in the stage's own unit."""

    def render(self, task: Task) -> Text:
        unit = task.fields["unit"]
        show = size if unit == "bytes" else lambda value: f"{value:.0f}"
        done = show(task.completed) + (f"/{show(task.total)}" if task.total is not None else "")
        rate = f"  {show(task.speed)}/s" if task.speed else ""
        return Text(f"{done}{'' if unit == 'bytes' else f' {unit}'}{rate}", style="dim")


class Bars:
    """An observer that draws one bar per stage on stderr."""

    _running: tuple[Progress, TaskID, str] | None = None

    @contextmanager
    def stage(self, title: str, total: float | None, unit: str) -> Iterator[Advance]:
        """See :class:`liftkit.progress.Observer`."""
        columns = (
            SpinnerColumn(finished_text="[green]✓[/]"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            _Rate(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=err) as progress:
            task = progress.add_task(escape(title), total=total, unit=unit)
            self._running = progress, task, title
            yield lambda amount: progress.advance(task, amount)
            self._running = None
            # A stage that had enough before its end is done all the same.
            progress.update(task, total=progress.tasks[0].completed)

    def note(self, text: str) -> None:
        """See :class:`liftkit.progress.Observer`."""
        note(text)

    def status(self, text: str) -> None:
        """See :class:`liftkit.progress.Observer`."""
        if self._running is not None:
            progress, task, title = self._running
            progress.update(task, description=escape(f"{title}  {text}"))
