"""``liftkit compare``: pixel models beside their latent base and beside every control."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from liftkit.checkpoint.text import printable
from liftkit.cli import console
from liftkit.options import CompareOptions, Html, Option

if TYPE_CHECKING:
    from liftkit.evaluate.comparison import Comparison


def compare(
    *,
    options: CompareOptions,
    html: Html = None,
    json: Annotated[
        Path | None, Option("File for the figures; docs/compare.md has the schema.", "FILE", default="none")
    ] = None,
) -> None:
    """Compare pixel models with their base and with controls.

    All are sampled from the same noise; the last lines say what may be claimed.

    Example: liftkit compare demo pixel-klein --html compare.html --cache build/compare
    """
    console.first_word(f"reading {', '.join((options.base, *options.pixels))}")
    console.hold_report(html, json)
    from liftkit.evaluate.compare import execute
    from liftkit.evaluate.page import compare_page
    from liftkit.evaluate.plan import prepare

    console.quiet_libraries()
    found = execute(prepare(options), console.Bars())
    print_comparison(found)
    console.write_report(html, lambda: compare_page(found), json, found.to_dict())


def print_comparison(found: Comparison) -> None:
    """The table, figure by figure, and for each pixel model what may be claimed."""
    from liftkit.evaluate.metrics import words

    console.result(comparison=found.to_dict())
    table = _table(found)
    # Figures that wrap inside their cells cannot be read; a narrow terminal breaks whole lines instead.
    table.width = Measurement.get(console.out, console.out.options.update(width=1000), table).maximum
    console.out.print(table)
    for name, about in found.metrics.items():
        if "left_out" not in about:
            console.out.print(Text(printable(f"{name}: {words(about)}"), style="dim"))
    console.out.print()
    for verdict in found.verdicts:
        rows = []
        for name, standing in verdict.standings.items():
            parts = [("beats", standing.beats), ("level with", standing.level), ("behind", standing.behind)]
            rows.append((name, "; ".join(f"{how} {', '.join(which)}" for how, which in parts if which)))
        console.table(verdict.label, rows)
        console.out.print(Text(f"{verdict.text}\n", style="bold"))
    for note in found.notes:
        console.note(note)
    for row in found.rows:
        if row.score is None:
            console.note(f"control not given: {row.label} (--{row.key} FOLDER)")


def _table(found: Comparison) -> Table:
    """One column per row of the comparison, for the figures are many."""
    from liftkit.evaluate.figures import FIGURES

    title = f"{found.count} samples each, against {found.real['reference']} real images"
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("", style="dim", no_wrap=True)
    table.add_column("better", style="dim", no_wrap=True)
    # Controls that were not given and figures that no row has are named or left out, not drawn as dashes.
    shown = [row for row in found.rows if row.score is not None]
    for row in shown:
        head = (
            row.label
            if row.role == "pixel"
            else row.key + (f"\n{row.detail['amount']:g}" if "amount" in row.detail else "")
        )
        style = "bold" if row.role == "pixel" else "dim"
        table.add_column(printable(head), justify="right", header_style=style)
    for name, figure in FIGURES.items():
        best, cells = found.best(name), []
        values = [row.score.figures[name] if row.score is not None else None for row in shown]
        if all(value is None for value in values):
            continue
        for row, value in zip(shown, values):
            text = figure.show(value)
            cells.append(Text(text, style="bold") if row.key in best else text)
        table.add_row(name, figure.better, *cells)
    return table
