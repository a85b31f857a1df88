"""What the commands print with: one console for results, one for progress and complaints, and the object of ``--json``."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from liftkit.checkpoint.files import output_file, write_text
from liftkit.checkpoint.text import printable
from liftkit.cli import bars
from liftkit.cli.terminal import SafeConsole
from liftkit.progress import first_process
from liftkit.progress import size as size
from liftkit.tally import Tally


@dataclass
class Settings:
    """Choices that hold for the whole run.

    Args:
        debug: show the traceback of an error.
        quiet: print errors and nothing else.
        json: print one JSON object on stdout, and everything else on stderr.
    """

    debug: bool = False
    quiet: bool = False
    json: bool = False


@dataclass
class Answer:
    """What ``--json`` prints in the end.

    Args:
        command: that runs, such as ``recipes list``; empty before there is one.
        fields: what it found, by the keys of :data:`liftkit.cli.answers.KEYS`.
        errors: what went wrong, line by line.
        after: returns what to do after an interruption, for its last line.
    """

    command: str = ""
    fields: dict[str, Any] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    after: Callable[[], str] = lambda: "the same command starts again"


settings = Settings()
answer = Answer()
out = SafeConsole()
err = SafeConsole(stderr=True)


held = ExitStack()
"""What the running command holds until its end; see :func:`hold`."""


def hold(output: AbstractContextManager[None]) -> None:
    """Hold an output until the command ends: checked and locked before the work begins."""
    held.enter_context(output)


def quiet_loggers() -> None:
    """Packages that quantize name each part of theirs that does not suit this torch, when diffusers imports them: not here."""
    if not settings.debug:
        for name in ("torchao", "bitsandbytes", "torch.utils._pytree"):
            logging.getLogger(name).setLevel(logging.ERROR)


def quiet_libraries() -> None:
    """Our bars and lines say what matters: no notices, bars and warnings of the libraries below."""
    import warnings

    from diffusers.utils import logging as library

    if not settings.debug:
        warnings.simplefilter("ignore")
        library.set_verbosity_error()
    library.disable_progress_bar()


def first_word(text: str) -> None:
    """What a command does first, on stderr: a line at once, before it imports libraries that take seconds.

    Args:
        text: such as ``reading MODEL``, to follow the command's name.
    """
    if not (settings.quiet or settings.json) and first_process():
        err.print(Text(f"{answer.command}: {printable(text)} ...", style="dim"))


def begin() -> None:
    """A run starts: choices and answers of an earlier one in this process are forgotten."""
    vars(settings).update(vars(Settings()))
    vars(answer).update(vars(Answer()))


def result(**found: Any) -> None:
    """What a command found, for ``--json``: plain data, paths allowed. Keys: :data:`liftkit.cli.answers.KEYS`."""
    answer.fields |= found


def answer_text(exit_code: int) -> str:
    """The object of ``--json``, on one line; ``ok`` says whether the exit code is 0."""
    given = {"command": answer.command or None, "ok": exit_code == 0}
    failed = {"error": "\n".join(answer.errors) or "failed", "exit_code": exit_code} if exit_code else {}
    # JSON escapes all control characters but this one.
    return json.dumps(_plain(given | failed | answer.fields | given)).replace("\x7f", "\\u007f")


def _plain(value: Any) -> Any:
    """Data that every JSON parser reads: paths as text, numbers that are not finite as null."""
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float) else str(value)


def fail(message: str) -> None:
    """One line on stderr, and in the object of ``--json``."""
    answer.errors.append(message)
    err.print(Text.assemble(("error", "bold red"), f": {printable(message)}"))


def resumable() -> None:
    """The command that runs now goes on where it was interrupted when it is given again."""
    answer.after = lambda: "the same command goes on where it stopped"


def interrupted() -> None:
    """The last line after Ctrl-C: that it was one, and what to do next."""
    fail(f"interrupted; {answer.after()}")


def note(message: str) -> None:
    """One line on stderr, not an error."""
    if not settings.quiet:
        err.print(Text.assemble(("note", "yellow"), f": {printable(message)}"))


def tallies(found: Iterable[Tally]) -> None:
    """Accounts of what was read: a note on whatever was left out, and all of them for ``--json``."""
    counted = list(found)
    result(tallies=[tally.to_json() for tally in counted])
    for summary in filter(None, (tally.summary() for tally in counted)):
        note(summary)


def hold_report(html: Path | None, json: Path | None) -> None:
    """Hold the page and the file of figures that a command will write."""
    for target, ending in ((html, ".html"), (json, ".json")):
        hold(output_file(target, ending))


def write_report(html: Path | None, page: Callable[[], str], data: Path | None, figures: dict[str, Any]) -> None:
    """Write what was asked for, and say where it is.

    Args:
        html: file for the page; ``page`` makes it.
        data: file for the figures.
    """
    if html is not None:
        write_text(html, page())
        out.print(f"page: {html} (opens offline)")
    if data is not None:
        write_text(data, json.dumps(figures, indent=2) + "\n")
        out.print(f"figures: {data}")


def table(title: str, rows: list[tuple[str, str]]) -> None:
    """Two columns under a title."""
    grid = Table(
        title=Text(printable(title)),
        title_justify="left",
        title_style="bold",
        show_header=False,
        box=None,
        pad_edge=False,
    )
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for key, value in rows:
        # Escapes are longer than what they stand for, and have to be there when the columns are measured.
        grid.add_row(printable(key), printable(value))
    out.print(grid)
    out.print()


class Bars(bars.Bars):
    """Progress on stderr."""

    def __init__(self) -> None:
        super().__init__(err, note, settings.quiet)
