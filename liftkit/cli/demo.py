"""``liftkit demo``: convert an embedded model, mend it for a minute, and show what happened."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from rich.table import Table

from liftkit.cli import console
from liftkit.options import LAST_SEED, Option

if TYPE_CHECKING:
    from liftkit.demo import Demonstration

SHOWN = {"digit": "digits", "color": "colors", "gradient_median": "grain", "laplacian": "sharp"}
"""The figures that the demo shows; the page has all."""
BETTER = {"high": "up", "ratio": "near 1"}
"""Which values are better, by the kind of figure."""


def demo(
    output: Annotated[
        Path, Option("Output folder for the models, the picture and the page.", "FOLDER", ("--output", "-o"))
    ] = Path("out/demo"),
    seed: Annotated[int, Option("Seed of the noise and of the images.", min=0, max=LAST_SEED)] = 0,
    quick: Annotated[bool, Option("Leave out the live finetune, so that the demo takes less than a minute.")] = False,
    model: Annotated[
        Literal["demo", "tiny-flux2"],
        Option(
            "The embedded model: `demo` is tiny-klein; `tiny-flux2` works on FLUX.2's own latents and takes twice as long."
        ),
    ] = "demo",
    images: Annotated[
        int | None,
        Option(
            "Write only this many of the demo's images, with captions, to the output folder, and stop.",
            min=1,
            default="none",
        ),
    ] = None,
) -> None:
    """Convert and finetune the embedded model in minutes.

    All models are then compared on the same noise.

    Example: liftkit demo -o out/demo
    """
    if images is not None:
        console.first_word(f"drawing {images} images")
        _write_images(output, images, seed)
        return
    console.first_word("converting the embedded model, then comparing what every model makes of the same noise")
    from liftkit.cli.answers import conversion_data, plan_data
    from liftkit.demo import run

    console.quiet_libraries()
    result = run(output, seed=seed, observer=console.Bars(), quick=quick, model=model)
    console.result(plan=plan_data(result.conversion.plan), **conversion_data(result.conversion))
    console.result(comparison=result.comparison.to_dict())
    console.result(finetuned=result.finetuned, picture=result.picture, page=result.page)
    _print_table(result)
    console.out.print(f"picture  {result.picture}")
    console.out.print(f"page     {result.page} (all figures, each explained)")
    console.out.print(f'next     liftkit sample {_newest(result)} -p "a red seven on flower petals" -o seven.png')


def _write_images(output: Path, count: int, seed: int) -> None:
    from liftkit.data.demo_folder import write_images

    write_images(output, count, seed=seed)
    console.result(images=output, count=count)
    console.out.print(f"{count} images with captions in {output} (64 x 64 pixels, digits on photographs)")


def _print_table(result: Demonstration) -> None:
    """Before and after, in the four figures that say most: their directions, and a line for each model."""
    from liftkit.evaluate.figures import FIGURES

    table = Table(box=None, pad_edge=False)
    table.add_column(f"{result.comparison.count} samples; better:", no_wrap=True)
    for name, head in SHOWN.items():
        table.add_column(f"{head} {BETTER[FIGURES[name].kind]}", justify="right", no_wrap=True)
    for row in result.comparison.rows:
        if row.score is not None and (row.key == "base" or row.role == "pixel"):
            label = "before: latent model" if row.key == "base" else f"after: {row.label}"
            cells = (FIGURES[name].show(row.score.figures.get(name)) for name in SHOWN)
            table.add_row(label, *cells)
    console.out.print(table)


def _newest(result: Demonstration) -> Path:
    """The model to go on with: the one finetuned here, else the conversion."""
    return result.finetuned or result.conversion.output
