"""``liftkit finetune``: train a recipe to its end, resume it, or say what it would do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from liftkit.cli import console

if TYPE_CHECKING:
    from liftkit.finetune.recipe import Recipe
    from liftkit.finetune.run import Finetuned


def finetune(
    recipe: Annotated[
        str, typer.Argument(help="A recipe file, or the name of a shipped one (see liftkit recipes list).")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Values that replace the recipe's.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The run folder; the same as output=...")
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(help="Go on from 'latest' complete checkpoint of the run folder, or from the one at a path."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would happen and stop.")] = False,
) -> None:
    """Finetune a converted model: mend colour, fine detail and patch borders.

    Example: liftkit finetune tiny-klein steps=100 -o runs/first
    """
    from liftkit.finetune.recipe_file import load_recipe

    given = [*(overrides or []), *([f"output={json.dumps(str(output))}"] if output is not None else [])]
    chosen = load_recipe(recipe, given)
    console.quiet_libraries()
    if dry_run:
        _dry_run(chosen)
        return
    from liftkit.finetune.run import finetune as run

    done = run(chosen, resume=resume, observer=console.Bars())
    if done.trainer.accelerator.is_main_process:
        _report(chosen, done)
    if done.outcome.stopped:
        raise typer.Exit(130)


def _report(recipe: Recipe, done: Finetuned) -> None:
    trainer = done.trainer
    per_step = trainer.speed.seconds / max(trainer.speed.steps, 1)
    rows = [
        ("steps", f"{done.outcome.step} of {recipe.steps} in {done.outcome.seconds:.0f} s, {per_step:.3f} s a step"),
        ("speed", ", ".join(_speed(recipe, done))),
    ]
    if done.skipped:
        rows.append(("images", done.skipped))
    if done.result is None:
        rows.append(("stopped", f"go on with --resume latest -o {recipe.output}"))
    else:
        rows += [("result", str(done.result)), ("next", _next(recipe, done.result))]
    console.table("Finetuned" if done.result is not None else "Stopped", rows)


def _speed(recipe: Recipe, done: Finetuned) -> list[str]:
    from liftkit.finetune.memory import peak_memory

    speed = done.trainer.speed
    per_step = speed.seconds / max(speed.steps, 1)
    parts = [f"{recipe.batch_size / per_step:.1f} images/s"] if speed.steps else []
    parts += [f"{speed.flops / per_step / 1e12:.3f} TFLOPS"] if speed.flops and per_step else []
    return [*parts, f"peak memory {console.size(peak_memory(done.trainer.accelerator.device))}"]


def _next(recipe: Recipe, result: Path) -> str:
    if recipe.save == "adapter":
        return f'liftkit sample {recipe.model} --adapter {result} -p "..." -o grid.png'
    return f'liftkit sample {result} -p "..." -o grid.png'


def _dry_run(recipe: Recipe) -> None:
    from liftkit.finetune.dry_run import describe

    console.out.print(recipe.to_yaml(), markup=False)
    for title, rows in describe(recipe, console.Bars()):
        console.table(title, rows)
