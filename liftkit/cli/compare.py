"""``liftkit compare``: pixel models beside their latent base and beside every control."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from liftkit.checkpoint.text import printable
from liftkit.cli import console, guiding

if TYPE_CHECKING:
    from liftkit.evaluate.comparison import Comparison


def compare(
    base: Annotated[str, typer.Argument(help="The latent model: a folder, a Hub id, or 'demo'.")],
    pixels: Annotated[list[str], typer.Argument(metavar="PIXEL...", help="Pixel models: converted folders.")],
    real: Annotated[
        str, typer.Option(help="'demo', or a folder of images; one without a caption takes the empty prompt.")
    ] = "demo",
    count: Annotated[
        int | None, typer.Option("--count", "-n", min=8, help="Samples of each model.", show_default="512, quick: 64")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**62, help="Sample i starts from seed + i, in every model.")] = 0,
    steps: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            max=10_000,
            help="Denoising steps; repeat for base and each PIXEL.",
            show_default="16 for demo images",
        ),
    ] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale.", show_default="4 for demo images")] = None,
    guidance_start: guiding.Start = 0.0,
    guidance_stop: guiding.Stop = 1.0,
    guidance_orthogonal: guiding.Orthogonal = False,
    label: Annotated[list[str] | None, typer.Option(help="What to call a PIXEL; repeat in order.")] = None,
    continued: Annotated[
        str | None, typer.Option(help="A control: the latent base, trained on as long on the same images.")
    ] = None,
    scratch: Annotated[
        str | None, typer.Option(help="A control: the pixel network from random weights, by the same recipe.")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="Prompts, one a line, instead of captions.")] = None,
    resolution: Annotated[
        int | None, typer.Option(min=1, help="Side of the images.", show_default="the base's")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write one page with pictures that opens offline.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the figures; the schema is in docs/compare.md.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, mps, ...")] = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Samples at once.")] = 16,
    cache: Annotated[
        Path | None, typer.Option(help="Keep samples and scores here: another run goes on with them.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Few samples, no Frechet distances: to look, not to claim.")
    ] = False,
) -> None:
    """Score pixel models, their latent base and every control on the same noise, and say what may be claimed.

    Example: liftkit compare demo pixel-klein --html compare.html --cache build/compare
    """
    from liftkit.checkpoint.files import output_file, write_text
    from liftkit.evaluate.compare import execute
    from liftkit.evaluate.comparison import CompareOptions
    from liftkit.evaluate.plan import prepare
    from liftkit.guidance import Guidance

    for target, ending in ((html, ".html"), (json, ".json")):
        console.hold(output_file(target, ending))
    options = CompareOptions(
        base=base,
        pixels=tuple(pixels),
        real=real,
        count=count,
        seed=seed,
        steps=tuple(steps or ()),
        guidance=Guidance(guidance, guidance_start, guidance_stop, guidance_orthogonal),
        labels=tuple(label or ()),
        continued=continued,
        scratch=scratch,
        prompts=prompts,
        resolution=resolution,
        device=device,
        batch_size=batch_size,
        cache=cache,
        quick=quick,
    )
    console.quiet_libraries()
    found = execute(prepare(options), console.Bars())
    print_comparison(found)
    if html is not None:
        from liftkit.evaluate.page import compare_page

        write_text(html, compare_page(found))
        console.out.print(f"page: {html} (opens offline)")
    if json is not None:
        from json import dumps

        write_text(json, dumps(found.to_dict(), indent=2) + "\n")
        console.out.print(f"figures: {json}")


def print_comparison(found: Comparison) -> None:
    """The table, figure by figure, and for each pixel model what may be claimed."""
    console.result(comparison=found.to_dict())
    table = _table(found)
    # Figures that wrap inside their cells cannot be read; a narrow terminal breaks whole lines instead.
    table.width = Measurement.get(console.out, console.out.options.update(width=1000), table).maximum
    console.out.print(table)
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
