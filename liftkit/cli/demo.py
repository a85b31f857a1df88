"""``liftkit demo``: convert the embedded checkpoint, mend it for a minute, and show what happened."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from liftkit.cli import console


def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the models, the picture and the page.")
    ] = Path("out/demo"),
    seed: Annotated[int, typer.Option(min=0, help="Of noise and images.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Leave the live finetune out: under a minute.")] = False,
) -> None:
    """Convert the embedded tiny-klein, finetune it for a minute, and compare all models on the same noise.

    Example: liftkit demo -o out/demo
    """
    from liftkit.cli.compare import print_comparison
    from liftkit.cli.convert import print_plan, print_summary
    from liftkit.demo import run

    console.quiet_libraries()
    result = run(output, seed=seed, observer=console.Bars(), on_plan=print_plan, quick=quick)
    print_summary(result.conversion)
    print_comparison(result.comparison)
    rows = [("picture", str(result.picture)), ("page", f"{result.page} (opens offline)")]
    rows.append(("alignment", str(result.conversion.output / "alignment.html")))
    if result.finetuned is not None:
        rows.append(("finetuned here", str(result.finetuned)))
    console.table("Demo", rows)
    console.result(finetuned=result.finetuned, picture=result.picture, page=result.page)
