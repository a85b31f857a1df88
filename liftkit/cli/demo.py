"""``liftkit demo``: convert the embedded checkpoint and show what happened."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from liftkit.cli import console


def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the model, the picture and the page.")
    ] = Path("out/demo"),
    seed: Annotated[int, typer.Option(min=0, help="Of noise and images.")] = 0,
) -> None:
    """Convert the embedded tiny-klein and paint the same noise with both models.

    Example: liftkit demo -o out/demo
    """
    from liftkit.cli.convert import print_plan, print_summary
    from liftkit.demo import run

    console.quiet_libraries()
    result = run(output, seed=seed, observer=console.Bars(), on_plan=print_plan)
    print_summary(result.conversion)
    console.table(
        "Demo",
        [
            ("prompts obeyed by the latent model", result.say(result.latent_verdicts)),
            ("by its pixel twin, untrained", result.say(result.pixel_verdicts)),
            ("picture", str(result.picture)),
            ("page", f"{result.page} (opens offline)"),
        ],
    )
