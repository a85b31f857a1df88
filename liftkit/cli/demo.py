"""``liftkit demo``: convert the embedded checkpoint, mend it for a minute, and show what happened."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.markup import escape
from rich.table import Table

from liftkit.cli import console
from liftkit.options import LAST_SEED, Option

if TYPE_CHECKING:
    from liftkit.demo import Demonstration

SHOWN = {
    "digit": "digits right\n(1 is best)",
    "color": "colors right\n(1 is best)",
    "gradient_median": "grain\n(1 is as real)",
    "laplacian": "sharpness\n(1 is as real)",
}
"""The figures that the demo shows; the page has all."""


def demo(
    output: Annotated[
        Path, Option("Output folder for the models, the picture and the page.", "FOLDER", ("--output", "-o"))
    ] = Path("out/demo"),
    seed: Annotated[int, Option("Seed of the noise and of the images.", min=0, max=LAST_SEED)] = 0,
    quick: Annotated[bool, Option("Leave out the live finetune, so that the demo takes less than a minute.")] = False,
) -> None:
    """Convert and finetune the embedded model in minutes.

    All models are then compared on the same noise.

    Example: liftkit demo -o out/demo
    """
    from liftkit.cli.answers import conversion_data, plan_data
    from liftkit.demo import run

    console.quiet_libraries()
    console.out.print("Converting the embedded tiny-klein, then comparing what every model makes of the same noise.")
    result = run(output, seed=seed, observer=console.Bars(), quick=quick)
    console.result(plan=plan_data(result.conversion.plan), **conversion_data(result.conversion))
    console.result(comparison=result.comparison.to_dict())
    console.result(finetuned=result.finetuned, picture=result.picture, page=result.page)
    _print_table(result)
    rows = [("picture", str(result.picture)), ("page", f"{result.page} (all figures, explained; opens offline)")]
    rows.append(("next", f'liftkit sample {_newest(result)} -p "a red seven on flower petals" -o seven.png'))
    console.table("Look", rows)


def _print_table(result: Demonstration) -> None:
    """Before and after, in the three figures that say most: a line for each model."""
    from liftkit.evaluate.figures import FIGURES

    rows = [row for row in result.comparison.rows if row.score is not None and row.key in ("real", "base")]
    rows += [row for row in result.comparison.rows if row.role == "pixel"]
    names = {"real": "real images", "base": "latent model, before"}
    table = Table(box=None, pad_edge=False)
    table.add_column(f"{result.comparison.count} samples of each model", no_wrap=True)
    for head in SHOWN.values():
        table.add_column(head, justify="right")
    for row in rows:
        figures = row.score.figures if row.score is not None else {}
        cells = (FIGURES[name].show(figures.get(name)) for name in SHOWN)
        table.add_row(escape(names.get(row.key, f"pixel model, {row.label}")), *cells)
    console.out.print(table)
    console.out.print()


def _newest(result: Demonstration) -> Path:
    """The model to go on with: the one finetuned here, else the conversion."""
    return result.finetuned or result.conversion.output
