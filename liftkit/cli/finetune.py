"""``liftkit finetune``: train a recipe to its end, resume it, or say what it would do."""

from __future__ import annotations

import json
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer

from liftkit.cli import console
from liftkit.cli.completion import complete_recipe
from liftkit.cli.convert import DryRun
from liftkit.cli.push import Public, Push, check, send
from liftkit.errors import UsageError
from liftkit.interrupt import exit_code
from liftkit.options import FinetuneOptions
from liftkit.progress import Silent, first_process

if TYPE_CHECKING:
    from liftkit.finetune.recipe import Recipe
    from liftkit.finetune.run import Finetuned


def finetune(
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="RECIPE",
            help="Recipe file, or the name of a shipped one (see liftkit recipes list). With --resume it may be left out: the "
            "run folder's own recipe is taken.",
            show_default=False,
            autocompletion=complete_recipe,
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="SECTION.KEY=VALUE", help="Values that replace those of the recipe."),
    ] = None,
    *,
    options: FinetuneOptions,
    dry_run: DryRun = False,
    push: Push = None,
    public: Public = False,
) -> None:
    """Finetune a converted model by a recipe.

    It mends color, fine detail and patch borders.

    Example: liftkit finetune tiny-klein steps=100 -o runs/first
    """
    console.first_word(f"reading {recipe or options.resume or 'the recipe'}")
    check(push, public)
    if options.memory is not None and not dry_run:
        raise UsageError("--memory: settings that fit are looked for by --dry-run alone; add it, or leave --memory out")
    chosen, resume = _recipe(recipe, overrides or [], options)
    console.quiet_libraries()
    console.result(dry_run=dry_run, output=chosen.output)
    if dry_run:
        _dry_run(chosen, resume, options)
        return
    from liftkit.finetune.run import finetune as run

    console.answer.after = lambda: _after(chosen.output)
    observer = console.Bars() if first_process() else Silent()
    done = run(chosen, resume=resume, observer=observer)
    if done.trainer.accelerator.is_main_process:
        _report(chosen, done)
        if done.result is not None:
            send(done.result, push, public)
    if done.outcome.stopped:
        raise typer.Exit(exit_code(done.outcome.signal))


def _recipe(recipe: str | None, overrides: list[str], options: FinetuneOptions) -> tuple[Recipe, str | None]:
    """The recipe, and the checkpoint to go on from, of what was given on the command line."""
    from liftkit.finetune.recipe_file import load_recipe

    if recipe is not None and "=" in recipe and not Path(recipe).exists():
        overrides = [recipe, *overrides]
        recipe = None
    if options.resume is not None:
        from liftkit.finetune.resume import open_run

        return open_run(options.resume, recipe, overrides, options.output)
    if recipe is None:
        raise UsageError("no recipe: name one (liftkit recipes list has those that are shipped), or --resume a run")
    if options.output is not None:
        overrides = [*overrides, f"output={json.dumps(str(options.output))}"]
    return load_recipe(recipe, overrides), None


def _after(run: Path) -> str:
    """What to do after an interruption."""
    from liftkit.finetune.run_folder import resume_command
    from liftkit.finetune.state import checkpoints

    found = checkpoints(run / "checkpoints")
    if not found:
        return "no step was saved yet, the same command starts again"
    return f"step {found[-1][0]} is saved, go on by: {resume_command(run)}"


def _report(recipe: Recipe, done: Finetuned) -> None:
    from liftkit.finetune.run_folder import resume_command

    figures = _figures(recipe, done)
    console.result(
        result=done.result,
        stopped=done.outcome.stopped,
        tallies=[tally.to_json() for tally in done.tallies],
        **figures,
    )
    rows = [("steps", _steps(figures)), ("speed", ", ".join(_speed(figures)))]
    rows += [(tally.what, summary) for tally in done.tallies if (summary := tally.summary())]
    previews = recipe.output / "previews" / "over-time.png"
    if previews.is_file():
        rows.append(("previews", f"over time in {previews}"))
    if done.result is None:
        rows.append(("go on", resume_command(recipe.output)))
    else:
        rows += [("result", str(done.result)), ("next", _next(recipe, done.result))]
        rows += _may_go(recipe.output)
    console.table("Finetuned" if done.result is not None else "Stopped", rows)


def _figures(recipe: Recipe, done: Finetuned) -> dict[str, Any]:
    """How far and how fast; None for what was not measured."""
    from liftkit.finetune.memory import peak_memory

    speed = done.trainer.speed
    per_step = speed.seconds / speed.steps if speed.steps else None
    return {
        "step": done.outcome.step,
        "steps": recipe.steps,
        "seconds": done.outcome.seconds,
        "seconds_per_step": per_step,
        "images_per_second": recipe.batch_size / per_step if per_step else None,
        "tflops": speed.flops / per_step / 1e12 if per_step and speed.flops else None,
        "peak_memory": peak_memory(done.trainer.accelerator.device),
    }


def _steps(figures: dict[str, Any]) -> str:
    step, steps = figures["step"], figures["steps"]
    if not figures["seconds_per_step"] and step >= steps:
        return f"{step} done before, {steps} asked for: nothing was left to train"
    per_step = f", {figures['seconds_per_step']:.3f} s a step" if figures["seconds_per_step"] else ""
    return f"{step} of {steps} in {figures['seconds']:.0f} s{per_step}"


def _speed(figures: dict[str, Any]) -> list[str]:
    parts = [f"{figures['images_per_second']:.1f} images/s"] if figures["images_per_second"] else []
    parts += [f"{figures['tflops']:.3f} TFLOPS"] if figures["tflops"] else []
    return [*parts, f"peak memory {console.size(figures['peak_memory'])}"]


def _may_go(run: Path) -> list[tuple[str, str]]:
    from liftkit.finetune.clean import find

    size = find(run).size
    return [("may go", f"checkpoints and cache, {console.size(size)}: liftkit clean {quote(str(run))}")] if size else []


def _next(recipe: Recipe, result: Path) -> str:
    if recipe.save == "adapter":
        return f'liftkit sample {quote(recipe.model)} --adapter {quote(str(result))} -p "..." -o grid.png'
    return f'liftkit sample {quote(str(result))} -p "..." -o grid.png'


def _dry_run(recipe: Recipe, resume: str | None, options: FinetuneOptions) -> None:
    from liftkit.finetune.dry_run import describe

    if options.show_recipe:
        console.out.print(recipe.to_yaml())
    tables = describe(recipe, console.Bars(), resume, options.memory)
    console.result(recipe=recipe.model_dump(mode="json"), estimate={title: _joined(rows) for title, rows in tables})
    for title, rows in tables:
        console.table(title, rows)


def _joined(rows: list[tuple[str, str]]) -> dict[str, str]:
    """Rows by their names; of several with one name, the texts follow one another."""
    found: dict[str, list[str]] = {}
    for name, text in rows:
        found.setdefault(name, []).append(text)
    return {name: "; ".join(texts) for name, texts in found.items()}
