"""What a recipe would do, without doing it: what learns, how large a step is, what it takes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import nn

from liftkit.checkpoint.folder import tree_size
from liftkit.errors import UsageError
from liftkit.finetune.memory import estimate
from liftkit.finetune.recipe import Recipe
from liftkit.finetune.resume import check_model, find_resumption, model_record
from liftkit.finetune.run import check_packages, find_source, token_side, training_data
from liftkit.finetune.trainee import Trainee, open_trainee
from liftkit.progress import Observer

Rows = list[tuple[str, str]]


def describe(recipe: Recipe, observer: Observer, resume: str | None = None) -> list[tuple[str, Rows]]:
    """Tables of a dry run: titles and rows. Nothing is written and nothing encoded.

    Packages that are missing here are named in a table: the run may be meant for another machine.

    Raises:
        UsageError: whatever else the run itself would complain about before training.
    """
    resumption = find_resumption(recipe, resume) if resume is not None else None
    with TemporaryDirectory() as scratch:
        source = find_source(recipe, Path(scratch), observer)
        if resumption is not None:
            check_model(resumption, model_record(source))
            for note in resumption.notes():
                observer.note(note)
        trainee = open_trainee(recipe, source)
        missing = _missing(recipe, trainee)
        data, _ = training_data(recipe, trainee, Path(scratch))
        whole = tree_size(trainee.folder.path)
    side = token_side(trainee)
    height, width = data.sizes[0]
    tokens = height // side * (width // side)
    state = (3, height, width) if trainee.lift is not None else ("C", height // side, width // side)
    learns = sum(parameter.numel() for parameter in trainee.parameters.values())
    memory = estimate(trainee.network, learns, recipe.ema.enabled, recipe.optimizer.name)
    files = (1 + recipe.checkpoints.keep) * (4 * learns + memory["optimizer"] + memory["running mean"])
    step = [
        (
            "images",
            f"{sum(len(source) for source in data.sources)} from {', '.join(source.name for source in data.sources)}",
        ),
        ("tokens a step", f"{recipe.batch_size} x {tokens} = {recipe.batch_size * tokens:,}"),
        (
            "first batch",
            f"states {(recipe.batch_size, *state)}, micro batches of {recipe.micro_batch or recipe.batch_size}",
        ),
    ]
    needs = [(name, _bytes(count)) for name, count in memory.items()]
    needs += [("in all, without activations", _bytes(sum(memory.values()))), ("disk for checkpoints", _bytes(files))]
    if recipe.space == "latent" or recipe.objective.loss == "asymflow":
        rank = trainee.lift.rank if trainee.lift is not None else trainee.spec.token_size(trainee.transformer.config)
        cached = 2 * sum(len(source) for source in data.sources) * tokens * rank
        needs.append(("disk for cached latents", _bytes(cached)))
    if recipe.save == "model":
        needs.append(("disk for the result", _bytes(whole)))
    tables = [("What learns", _groups(trainee, learns)), ("A step", step), ("Memory", needs)]
    return [*tables, ("Missing", [("before it can run", missing)])] if missing else tables


def _missing(recipe: Recipe, trainee: Trainee) -> str:
    """What :func:`liftkit.finetune.run.check_packages` complains about."""
    try:
        check_packages(recipe, trainee)
    except UsageError as error:
        return str(error)
    return ""


def _groups(trainee: Trainee, learns: int) -> Rows:
    """Numbers that learn, by the module or the kind of module that they belong to, and those that stay."""
    counts: Counter[str] = Counter()
    for name, parameter in trainee.parameters.items():
        kind = (
            "LoRA"
            if ".lora_" in name
            else next((p for p in trainee.learns["full"] if p and name.startswith(p)), "all weights")
        )
        counts[kind] += parameter.numel()
    frozen = sum(p.numel() for p in _own(trainee.network) if not p.requires_grad)
    rows = [(kind, f"{count:,}") for kind, count in sorted(counts.items())]
    lora = trainee.learns["lora"]
    rows += [("LoRA on", f"{len(lora)} modules, {lora[0]} ... {lora[-1]}")] if lora else []
    return [*rows, ("in all", f"{learns:,}"), ("frozen", f"{frozen:,}")]


def _own(network: nn.Module) -> list[nn.Parameter]:
    return list(network.parameters())


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
