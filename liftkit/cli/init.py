"""``liftkit init``: an untrained pixel model, to train from nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from liftkit.cli import console
from liftkit.options import InitOptions, Option


def init(
    output: Annotated[Path, Option("Pipeline folder to make.", "FOLDER", ("--output", "-o"))],
    options: InitOptions,
) -> None:
    """Make an untrained pixel model of any rank.

    It is conditioned on a class, and finetune, sample and compare take it like any other.

    Example: liftkit init --architecture jit --size B --classes photos/ --images photos/ --rank auto -o begun
    """
    console.first_word(f"preparing {output}")
    from liftkit.conversion.scratch import begin

    console.quiet_libraries()
    done = begin(output, options, console.Bars())
    lift = done.lift
    console.result(output=done.folder, rank=lift.rank, dim=lift.dim, parameters=done.parameters)
    rows = [
        ("network", f"{done.name}, {done.parameters / 1e6:.1f} million parameters"),
        ("token", f"{lift.patch_size} x {lift.patch_size} {lift.space}s, {lift.dim} numbers"),
        ("rank", done.chosen.reason if done.chosen is not None else str(lift.rank)),
    ]
    if "energy_captured" in lift.figures:
        rows.append(("energy in it", f"{lift.figures['energy_captured']:.3f}"))
    rows += [("model", str(done.folder)), ("next", "a recipe with objective.loss: flow (docs/from-scratch.md)")]
    console.table("Begun", rows)
