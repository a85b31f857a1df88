"""What a recipe would do, without doing it: the images found, what learns, what it takes and how long."""

from __future__ import annotations

import math
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from liftkit.checkpoint.folder import tree_size
from liftkit.data.batch import Batch
from liftkit.data.cache import FactsTable
from liftkit.data.filling import Filling, check_captions
from liftkit.data.training import TrainingData
from liftkit.data.usable import give_sizes
from liftkit.errors import UsageError
from liftkit.finetune.encoders import load_vae
from liftkit.finetune.memory import estimate
from liftkit.finetune.offload import waiting_bytes
from liftkit.finetune.recipe import Recipe
from liftkit.finetune.resume import check_model, find_resumption, model_record
from liftkit.finetune.run import check_packages, make_accelerator
from liftkit.finetune.run_folder import RunFolder
from liftkit.finetune.sources import find_source, token_side, training_data
from liftkit.finetune.step import with_shift_of
from liftkit.finetune.trainee import Trainee, open_trainee
from liftkit.finetune.trainer import Trainer
from liftkit.formats.asymflow_limits import export_problem
from liftkit.progress import Observer, Silent
from liftkit.progress import size as _bytes
from liftkit.tally import Tally, combined

DECODED = 1000
"""Images up to which a dry run decodes them all, to find those that are broken inside."""
MEASURED = 2e13
"""Floating-point operations of a step up to which it is timed on a CPU; a step of tiny-klein has 4e11."""
GPU = 2e14
"""Operations a second of the GPU of an estimate. Assumed, not measured: a fifth of an H100's nominal 9.9e14 in bfloat16."""

Rows = list[tuple[str, str]]


def describe(recipe: Recipe, observer: Observer, resume: str | None = None) -> list[tuple[str, Rows]]:
    """Tables of a dry run: titles and rows. Nothing is written and nothing encoded.

    Packages that are missing here are named in a table: the run may be meant for another machine.

    Raises:
        UsageError: whatever else the run itself would complain about before training.
    """
    folder = RunFolder(recipe.output)
    resume = folder.resumed(resume, observer.note)
    folder.check(resuming=resume is not None)
    resumption = find_resumption(recipe, resume) if resume is not None else None
    with TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        source = find_source(recipe, scratch, observer)
        if resumption is not None:
            check_model(resumption, model_record(source, resumption))
            for note in resumption.notes():
                observer.note(note)
        trainee = open_trainee(recipe, source)
        missing = _missing(recipe, trainee)
        data, held_out = training_data(recipe, trainee, scratch, observer)
        images, count = _images(data, held_out, scratch, observer)
        needs = _needs(recipe, trainee, data, count)
        first = resumption.step if resumption else 0
        takes = (
            _time(recipe, trainee, data, scratch, observer, first) if not missing else "not measured here: see below"
        )
    learns = _learns(recipe, trainee, data, count)
    learns.append(("noise", f"shift {with_shift_of(trainee.lift, recipe).noise.shift:.4g}"))
    tables = [("Images", images), ("What learns", learns), ("What it takes", needs)]
    needs.append(("time", takes))
    if trainee.lift is not None:
        problem = export_problem(type(trainee.transformer).__name__, trainee.lift.color, trainee.learns["full"])
        needs.append(("export", f"not to asymflow-adapter: {problem}" if problem else "to asymflow-adapter: yes"))
    return [*tables, ("Missing", [("before it can run", missing)])] if missing else tables


def _missing(recipe: Recipe, trainee: Trainee) -> str:
    """What :func:`liftkit.finetune.run.check_packages` complains about."""
    try:
        check_packages(recipe, trainee)
    except UsageError as error:
        return str(error)
    return ""


def _images(data: TrainingData, held_out: TrainingData | None, scratch: Path, observer: Observer) -> tuple[Rows, int]:
    """What the sources hold, and how many images can be trained on."""
    found, pictures = 0, 0
    tallies: list[Tally] = []
    rows: Rows = []
    own = 0
    for part in (data, *([held_out] if held_out else [])):
        filling = Filling(part.sources, FactsTable(scratch / "files.json"), max(1, part.workers), observer)
        usable = filling.inspect()
        if len(usable) <= DECODED:
            usable = filling.encode(usable, part.sizes, part.batch_size, None, None)
        else:
            give_sizes(usable, part.sizes, part.batch_size)
        found += sum(len(source) for source in part.sources)
        pictures += len(usable)
        tallies += [filling.images(usable), *(text for source in part.sources for text in source.texts)]
        for number, source in enumerate(part.sources):
            check_captions(source, [picture.caption for picture in usable if picture.source == number])
        if part is data:
            own = len(usable)
            silent = sum(not picture.caption for picture in usable)
            made = sum(bool(picture.references) for picture in usable)
            small = sum(p.facts.height < p.size[0] or p.facts.width < p.size[1] for p in usable)
            sizes = Counter(picture.size for picture in usable)
            if not usable:
                raise UsageError(f"{data.sources[0].name}: none of its {found} images can be read")
    names = ", ".join(dict.fromkeys(source.name for source in data.sources))
    rows.append(("found", f"{found} in {names}: {own} to train on, {pictures - own} held out for validation"))
    lost = [f"{tally.lost} {tally.what}: {tally.reasons()}" for tally in combined(tallies) if tally.lost]
    rows += [("left out", text) for text in lost or ["none"]]
    rows.append(("captions", f"{own - silent} with one, {silent} without (trained with the empty prompt)"))
    if made:
        rows.append(("references", f"{made} are made from others, {own - made} from prompts alone"))
    rows.append(("enlarged", f"{small} are smaller than they are trained at" if small else "none"))
    shapes = [f"{width} x {height}" for (height, width), _ in sizes.most_common(3)]
    rows.append(("trained at", f"{', '.join(shapes)}{' ...' if len(sizes) > 3 else ''} pixels"))
    if found > DECODED:
        rows.append(("", "their files were opened, not decoded: some may turn out to be broken inside"))
    return rows, own


def _learns(recipe: Recipe, trainee: Trainee, data: TrainingData, count: int) -> Rows:
    """Numbers that learn, by the module or the kind of module that they belong to, and how much they see."""
    counts: Counter[str] = Counter()
    for name, parameter in trainee.parameters.items():
        kind = (
            "LoRA"
            if ".lora_" in name
            else next((p for p in trainee.learns["full"] if p and name.startswith(p)), "all weights")
        )
        counts[kind] += parameter.numel()
    frozen = sum(p.numel() for p in trainee.network.parameters() if not p.requires_grad)
    lora = trainee.learns["lora"]
    parts = ", ".join(f"{kind} {number:,}" for kind, number in sorted(counts.items()))
    rows = [("model", f"{trainee.folder.name} ({type(trainee.transformer).__name__})")]
    rows.append(("numbers", f"{sum(counts.values()):,} learn ({parts}), {frozen:,} are frozen"))
    rows += [("LoRA on", f"{len(lora)} modules, {lora[0]} ... {lora[-1]}")] if lora else []
    rows += _head_row(trainee, data)
    seen = recipe.steps * recipe.batch_size
    tokens = _tokens(trainee, data)
    times = f"{seen / count:.0f}" if seen >= 10 * count else f"{seen / count:.1f}"
    rows.append(("steps", f"{recipe.steps} of {recipe.batch_size} images: each is seen about {times} times"))
    micro = recipe.micro_batch or recipe.batch_size
    rows.append(
        ("tokens a step", f"{recipe.batch_size} x {tokens} = {recipe.batch_size * tokens:,}, {micro} images at once")
    )
    return rows


def _head_row(trainee: Trainee, data: TrainingData) -> Rows:
    """What a detail head adds to a forward of the network, both counted as products of weights."""
    head = trainee.head
    if head is None:
        return []
    numbers = sum(parameter.numel() for parameter in head.parameters())
    weights = sum(parameter.numel() for parameter in trainee.transformer.parameters()) - numbers
    share = head.operations(math.prod(data.sizes[0])) / (2 * weights * _tokens(trainee, data))
    return [("detail head", f"{numbers:,} numbers, {100 * share:.2g} % of a forward's operations")]


def _needs(recipe: Recipe, trainee: Trainee, data: TrainingData, count: int) -> Rows:
    """Memory and disk."""
    learns = sum(parameter.numel() for parameter in trainee.parameters.values())
    memory = estimate(trainee.network, learns, recipe.ema.enabled, recipe.optimizer.name)
    files = (1 + recipe.checkpoints.keep) * (4 * learns + memory["optimizer"] + memory["running mean"])
    disk = {"checkpoints": files}
    if recipe.space == "latent" or recipe.objective.loss == "asymflow":
        rank = trainee.lift.rank if trainee.lift is not None else trainee.spec.token_size(trainee.transformer.config)
        disk["cached latents"] = 2 * count * _tokens(trainee, data) * rank
    if recipe.save == "model":
        disk["the result"] = tree_size(trainee.folder.path)
    waiting: Rows = []
    if recipe.base.offload == "blocks":
        host = waiting_bytes(trainee.transformer)
        memory["weights"] -= host
        waiting = [("host memory", f"{_bytes(host)} of frozen blocks that wait there")]
    return [
        ("memory", f"{_bytes(sum(memory.values()))} and activations ({_sum(memory)})"),
        *waiting,
        ("disk", f"{_bytes(sum(disk.values()))} ({_sum(disk)})"),
    ]


def _sum(parts: dict[str, Any]) -> str:
    return ", ".join(f"{name} {_bytes(count)}" for name, count in parts.items())


def _tokens(trainee: Trainee, data: TrainingData) -> int:
    """Tokens of an image of the first size."""
    side, (height, width) = token_side(trainee), data.sizes[0]
    return height // side * (width // side)


def _time(recipe: Recipe, trainee: Trainee, data: TrainingData, scratch: Path, observer: Observer, first: int) -> str:
    """How long the steps from ``first`` on take: by timing two of them here, or by a stated estimate."""
    steps = max(0, recipe.steps - first)
    weights = sum(p.numel() for p in trainee.transformer.parameters())
    # Forward and backward of the student, half or all of the backward for weights that learn, and the reference's forward.
    passes = (6 if recipe.trainable.mode == "full" else 4) + (2 if recipe.objective.loss == "asymflow" else 0)
    operations = passes * weights * recipe.batch_size * _tokens(trainee, data)
    if not torch.cuda.is_available() and operations > MEASURED:
        return (
            f"not measured on this CPU; estimated at {operations / 1e12:,.0f} TFLOP a step ({passes} x weights x tokens), "
            f"{span(steps * operations / GPU)} on one GPU at an assumed {GPU / 1e12:.0f} TFLOPS, which nobody measured"
        )
    trainer = Trainer(
        recipe, trainee, data, None, _vae(recipe, trainee), make_accelerator(recipe, RunFolder(scratch)), RunFolder(scratch),
        Silent(), {},
    )  # fmt: skip
    batch = _random_batch(recipe, trainee, data)
    seconds = math.inf
    with observer.stage("time two steps on random images", 2, "steps") as advance:
        for _ in range(2):
            began = time.monotonic()
            trainer.learner.learn(trainer.ahead(0, batch), 0)
            seconds = min(seconds, time.monotonic() - began)
            advance(1)
    device = trainer.accelerator.device
    peak = f", peak memory {_bytes(torch.cuda.max_memory_allocated(device))}" if device.type == "cuda" else ""
    return (
        f"about {span(steps * seconds)} for {steps} steps: {seconds:.2f} s a step, measured here on {device.type}{peak}"
    )


def _vae(recipe: Recipe, trainee: Trainee) -> Any:
    return load_vae(trainee.folder) if recipe.objective.perceptual == "vae" else None


def _random_batch(recipe: Recipe, trainee: Trainee, data: TrainingData) -> Batch:
    """A batch of noise in the shapes of the run's own."""
    generator = torch.Generator().manual_seed(0)
    count, (height, width), side = recipe.batch_size, data.sizes[0], token_side(trainee)
    images = torch.randint(256, (count, 3, height, width), generator=generator, dtype=torch.uint8)
    if trainee.lift is not None:
        patch, rank = trainee.lift.latent_patch, trainee.lift.rank
    else:
        patch = trainee.spec.latent_patch(trainee.transformer.config)
        rank = trainee.spec.token_size(trainee.transformer.config)
    latents = torch.randn((count, rank // patch**2, height // side * patch, width // side * patch), generator=generator)
    prompts = trainee.spec.conditioning(trainee.transformer.config, count, generator)
    return Batch(images, latents, prompts, [""] * count, [(0, 0)] * count)


def span(seconds: float) -> str:
    """A span of time in words."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds"
