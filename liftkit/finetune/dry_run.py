"""What a recipe would do, without doing it: the images found, what learns, what it takes and how long."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

from liftkit.checkpoint.model import ModelFolder
from liftkit.data.cache import FactsTable
from liftkit.data.filling import Filling, check_captions
from liftkit.data.training import TrainingData
from liftkit.data.usable import Picture, give_sizes
from liftkit.errors import UsageError
from liftkit.finetune.needs import Needs, Rows
from liftkit.finetune.proposals import propose
from liftkit.finetune.recipe import Recipe
from liftkit.finetune.resume import check_model, find_resumption, model_record
from liftkit.finetune.run import missing_packages
from liftkit.finetune.run_folder import RunFolder
from liftkit.finetune.sketch import Sketch, without_memory
from liftkit.finetune.sources import find_source, training_data
from liftkit.finetune.step import with_shift_of
from liftkit.finetune.trainee import Trainee, open_trainee
from liftkit.formats.asymflow_limits import export_problem
from liftkit.progress import Observer
from liftkit.progress import size as _bytes
from liftkit.tally import Tally, combined

DECODED = 1000
"""Images up to which a dry run decodes them all, to find those that are broken inside."""


def describe(
    recipe: Recipe, observer: Observer, resume: str | None = None, memory: int | None = None
) -> list[tuple[str, Rows]]:
    """Tables of a dry run: titles and rows. Nothing is written and nothing encoded.

    Packages that are missing here are named in a table: the run may be meant for another machine.

    Args:
        recipe: what would be done.
        observer: shows the progress.
        resume: ``latest``, or the path of a checkpoint to go on from.
        memory: bytes of a device for which settings are looked for; None looks for none.

    Raises:
        UsageError: whatever else the run itself would complain about before training.
    """
    if (idle := recipe.in_vain()) is not None:
        observer.note(idle)
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
        sketch, trainee = _opened(recipe, source)
        missing = missing_packages(recipe, trainee)
        data, held_out = training_data(recipe, trainee, scratch, observer)
        images, pictures = _images(data, held_out, scratch, observer)
        needs = Needs(recipe, sketch, trainee, data, pictures)
        observer.status("estimate memory")
        found = needs.estimate(recipe)
        takes = [*needs.memory_rows(found), needs.disk_row(found)]
        fitting = [(f"To fit {_bytes(memory)}", propose(needs, memory, observer))] if memory is not None else []
        first = resumption.step if resumption else 0
        lacking = missing and needs.timed_here
        time = "not measured here: see below" if lacking else needs.time(found, scratch, observer, first)
    takes.append(("time", time))
    learns = _learns(recipe, trainee, needs)
    learns.append(("noise", f"shift {with_shift_of(trainee.lift, recipe).noise.shift:.4g}"))
    tables = [("Images", images), ("What learns", learns), ("What it takes", takes), *fitting]
    if trainee.lift is not None:
        problem = export_problem(type(trainee.transformer).__name__, trainee.lift.color, trainee.learns["full"])
        takes.append(("export", f"not to asymflow-adapter: {problem}" if problem else "to asymflow-adapter: yes"))
    return [*tables, ("Missing", [("before it can run", each) for each in missing])] if missing else tables


def _opened(recipe: Recipe, source: ModelFolder) -> tuple[Sketch, Trainee]:
    """What the recipe trains, without reading a weight; but REPA's encoder is asked for, as the run itself does."""
    sketch = Sketch.of(recipe, source)
    if recipe.objective.repa:
        return sketch, open_trainee(recipe, source)
    transformer = sketch.transformer(recipe)
    with without_memory():
        return sketch, sketch.trainee(recipe, transformer)


def _images(
    data: TrainingData, held_out: TrainingData | None, scratch: Path, observer: Observer
) -> tuple[Rows, list[Picture]]:
    """What the sources hold, and what can be trained on."""
    found, pictures = 0, 0
    tallies: list[Tally] = []
    rows: Rows = []
    own: list[Picture] = []
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
            own = usable
            silent = sum(not picture.caption for picture in usable)
            made = sum(bool(picture.references) for picture in usable)
            small = sum(p.facts.height < p.size[0] or p.facts.width < p.size[1] for p in usable)
            sizes = Counter(picture.size for picture in usable)
            if not usable:
                raise UsageError(f"{data.sources[0].name}: none of its {found} images can be read")
    names = ", ".join(dict.fromkeys(source.name for source in data.sources))
    rows.append(("found", f"{found} in {names}: {len(own)} to train on, {pictures - len(own)} held out for validation"))
    lost = [f"{tally.lost} {tally.what}: {tally.reasons()}" for tally in combined(tallies) if tally.lost]
    rows += [("left out", text) for text in lost or ["none"]]
    rows.append(("captions", f"{len(own) - silent} with one, {silent} without (trained with the empty prompt)"))
    if made:
        rows.append(("references", f"{made} are made from others, {len(own) - made} from prompts alone"))
    rows.append(("enlarged", f"{small} are smaller than they are trained at" if small else "none"))
    shapes = [f"{width} x {height}" for (height, width), _ in sizes.most_common(3)]
    rows.append(("trained at", f"{', '.join(shapes)}{' ...' if len(sizes) > 3 else ''} pixels"))
    if found > DECODED:
        rows.append(("", "their files were opened, not decoded: some may turn out to be broken inside"))
    return rows, own


def _learns(recipe: Recipe, trainee: Trainee, needs: Needs) -> Rows:
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
    rows += _head_row(trainee, needs)
    seen = recipe.steps * recipe.batch_size
    tokens, count = needs.tokens, needs.count
    times = f"{seen / count:.0f}" if seen >= 10 * count else f"{seen / count:.1f}"
    rows.append(("steps", f"{recipe.steps} of {recipe.batch_size} images: each is seen about {times} times"))
    micro = recipe.micro_batch or recipe.batch_size
    rows.append(
        ("tokens a step", f"{recipe.batch_size} x {tokens} = {recipe.batch_size * tokens:,}, {micro} images at once")
    )
    return rows


def _head_row(trainee: Trainee, needs: Needs) -> Rows:
    """What a detail head adds to a forward of the network, both counted as products of weights."""
    head = trainee.head
    if head is None:
        return []
    numbers = sum(parameter.numel() for parameter in head.parameters())
    weights = sum(parameter.numel() for parameter in trainee.transformer.parameters()) - numbers
    share = head.operations(needs.tokens * needs.side**2) / (2 * weights * needs.tokens)
    return [("detail head", f"{numbers:,} numbers, {100 * share:.2g} % of a forward's operations")]
