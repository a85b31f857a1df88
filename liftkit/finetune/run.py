"""A finetune from recipe to result: model, data, trainer, what it leaves."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from liftkit.checkpoint.model import ModelFolder, find_model
from liftkit.data.captioned import CaptionedFolder, DemoCaptioned
from liftkit.data.source import CaptionedSource
from liftkit.data.training import TrainingData
from liftkit.errors import UsageError
from liftkit.finetune.recipe import DatasetSource, DemoSource, FolderSource, Recipe, Source, WebDatasetSource
from liftkit.finetune.result import base_record, card, learned_adapter, write_model
from liftkit.finetune.run_folder import RunFolder
from liftkit.finetune.state import find_checkpoint
from liftkit.finetune.trainee import Trainee, open_trainee
from liftkit.finetune.trainer import Outcome, Trainer
from liftkit.models.latents import LatentSpace
from liftkit.progress import Observer, Silent

SMALL_BATCH = 32


@dataclass
class Finetuned:
    """What a run did.

    Args:
        outcome: how it ended.
        result: the folder it left; None where it was stopped before its last step.
        trainer: with everything still in memory.
        skipped: images that could not be read, in words; empty if none.
    """

    outcome: Outcome
    result: Path | None
    trainer: Trainer
    skipped: str


def finetune(recipe: Recipe, *, resume: str | None = None, observer: Observer | None = None) -> Finetuned:
    """Train a recipe to its end, or on from a checkpoint.

    Args:
        recipe: see :class:`liftkit.finetune.recipe.Recipe`.
        resume: ``latest``, or the path of a checkpoint.
        observer: hears of the progress.

    Raises:
        UsageError: bad input; nothing was trained.
        LiftkitError: training failed; checkpoints are still there.
    """
    observer = observer or Silent()
    folder = RunFolder(recipe.output)
    folder.check(resuming=resume is not None)
    checkpoint = find_checkpoint(folder.checkpoints, resume) if resume is not None else None
    trainer = prepare(recipe, folder, observer)
    if checkpoint is not None:
        trainer.resume(checkpoint)
    outcome = trainer.train()
    result = None
    if not outcome.stopped:
        result = _write_result(trainer, folder, observer)
    trainer.accelerator.end_training()
    return Finetuned(outcome, result, trainer, trainer.skipped.summary())


def prepare(recipe: Recipe, folder: RunFolder, observer: Observer) -> Trainer:
    """Everything up to the first step: model, caches, the wrapped network; the run folder begins."""
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    accelerator = make_accelerator(recipe, folder)
    with accelerator.main_process_first():
        source = find_source(recipe, folder.path, observer)
        trainee = open_trainee(recipe, source)
        data, held_out = training_data(recipe, trainee, folder.path)
        fill_caches(recipe, trainee, [data, *([held_out] if held_out else [])], observer, str(accelerator.device))
    vae = load_vae(source).to(accelerator.device) if recipe.objective.perceptual == "vae" else None
    if accelerator.is_main_process:
        model = {"name": source.name, "sha256": base_record(source).get("sha256", {})}
        folder.begin(recipe, [each.describe() for each in (data, held_out) if each is not None], model)
    accelerator.wait_for_everyone()
    if recipe.trackers:
        accelerator.init_trackers("liftkit")
    trainer = Trainer(recipe, trainee, data, held_out, vae, accelerator, folder, observer)
    if trainer.skipped and accelerator.is_main_process:
        observer.note(trainer.skipped.summary())
    return trainer


def make_accelerator(recipe: Recipe, folder: RunFolder) -> Any:
    """accelerate's, for a recipe.

    Raises:
        UsageError: if the batch does not divide among the processes, or the device does not do the precision.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedDataParallelKwargs

    # accelerate keeps the precision of a process's first run for all that follow; each of ours has its own.
    AcceleratorState._reset_state()

    handlers = [DistributedDataParallelKwargs(find_unused_parameters=recipe.trainable.mode == "full")]
    try:
        accelerator = Accelerator(
            mixed_precision=recipe.precision,
            log_with=list(recipe.trackers) or None,
            project_dir=str(folder.path),
            kwargs_handlers=handlers,
        )
    except (ValueError, ImportError) as error:
        raise UsageError(f"precision {recipe.precision}, trackers {list(recipe.trackers)}: {error}") from error
    if recipe.batch_size % accelerator.num_processes:
        raise UsageError(f"batch_size: {recipe.batch_size} does not divide among {accelerator.num_processes} processes")
    return accelerator


def find_source(recipe: Recipe, output: Path, observer: Observer) -> ModelFolder:
    """The folder that training begins from; ``demo`` is tiny-klein, converted into the run folder where need be."""
    if recipe.model != "demo":
        return find_model(recipe.model)
    from liftkit.conversion.execute import convert
    from liftkit.embedded import TINY_KLEIN

    if recipe.space == "latent":
        return find_model(str(TINY_KLEIN))
    base = output / "base"
    if not base.is_dir():
        output.mkdir(parents=True, exist_ok=True)
        convert(str(TINY_KLEIN), base, observer=observer, images="demo", device="cpu")
    return find_model(str(base))


def make_source(source: Source) -> CaptionedSource:
    """Images and captions of one source of a recipe."""
    if isinstance(source, DemoSource):
        return DemoCaptioned(source.count)
    if isinstance(source, FolderSource):
        return CaptionedFolder(source.path)
    if isinstance(source, WebDatasetSource):
        from liftkit.data.shards import WebDataset

        return WebDataset(list(source.urls))
    assert isinstance(source, DatasetSource)
    from liftkit.data.hub import HubDataset

    return HubDataset(source.path, source.split, source.image_column, source.caption_column)


def training_data(recipe: Recipe, trainee: Trainee, output: Path) -> tuple[TrainingData, TrainingData | None]:
    """Training data and, where the recipe validates, held-out data; not prepared yet."""
    from liftkit.data.heldout import split

    choice = recipe.data
    sources = [(make_source(each), each.weight) for each in choice.sources]
    common: dict[str, Any] = {
        "resolution": choice.resolution or trainee.folder.image_size(),
        "multiple": token_side(trainee),
        "buckets": choice.buckets,
        "cache": choice.cache or output / "cache",
        "workers": choice.workers,
    }
    held_out = None
    if recipe.validation.every:
        sources, apart = split(sources, recipe.validation.images, recipe.seed)
        size = min(SMALL_BATCH, recipe.validation.images)
        held_out = TrainingData(apart, batch_size=size, seed=recipe.seed, prompt_dropout=0.0, **common)
    data = TrainingData(
        sources, batch_size=recipe.batch_size, seed=recipe.seed, prompt_dropout=choice.prompt_dropout, **common
    )
    return data, held_out


def token_side(trainee: Trainee) -> int:
    """Pixels along one token."""
    if trainee.lift is not None:
        return trainee.lift.patch_size
    return LatentSpace(load_vae(trainee.folder)).factor * trainee.spec.latent_patch(trainee.transformer.config)


def load_vae(folder: ModelFolder) -> Any:
    """The VAE of the latent model: a latent folder's own, or what a converted one keeps of its source."""
    import diffusers

    place = folder.path / "latent" / "vae" if (folder.path / "latent").is_dir() else folder.path / "vae"
    from liftkit.checkpoint.model import read_json

    made = getattr(diffusers, read_json(place / "config.json")["_class_name"])
    return made.from_pretrained(place, dtype=torch.float32, use_safetensors=True).eval().requires_grad_(False)


def fill_caches(recipe: Recipe, trainee: Trainee, parts: list[TrainingData], observer: Observer, device: str) -> None:
    """Encode what is not cached yet: latents where the loss needs them, and prompts. Encoders leave the memory after."""
    folder = trainee.folder
    needs_latents = recipe.space == "latent" or recipe.objective.loss == "asymflow"

    def image_encoder() -> Callable[[Tensor], Tensor]:
        space = LatentSpace(load_vae(folder).to(device))
        return lambda images: space.encode(images.to(device)).cpu()

    def prompt_encoder() -> Callable[[list[str]], dict[str, Tensor]]:
        pipeline, length = load_text_side(folder, device), folder.text_length()

        @torch.no_grad()
        def encode(prompts: list[str]) -> dict[str, Tensor]:
            return {name: each.cpu() for name, each in trainee.spec.prompts(pipeline, prompts, length).items()}

        return encode

    image_print = LatentSpace(load_vae(folder)).fingerprint() if needs_latents else ""
    extra = list(recipe.previews.prompts or ())
    for data in parts:
        data.prepare(
            image_encoder if needs_latents else None,
            image_print,
            prompt_encoder,
            text_fingerprint(folder),
            observer,
            extra,
        )
        gc.collect()


def load_text_side(folder: ModelFolder, device: str) -> Any:
    """The stock pipeline with its text encoders alone.

    Raises:
        UsageError: if it has none.
    """
    from diffusers import DiffusionPipeline

    if not any(name.startswith("text_encoder") and folder.class_of(name) for name in folder.index):
        raise UsageError(
            f"{folder.source}: no text encoder in this folder; finetuning needs the embeddings of its captions"
        )
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    pipeline = DiffusionPipeline.from_pretrained(
        folder.path, transformer=None, vae=None, dtype=dtype, use_safetensors=True
    )
    return pipeline.to(device)


def text_fingerprint(folder: ModelFolder) -> str:
    """Tells the text side of a model from others: names and sizes of its files, and how many tokens are asked for."""
    parts = [f"tokens {folder.text_length()}"]
    for name in sorted(folder.index):
        if name.startswith(("text_encoder", "tokenizer")) and (folder.path / name).is_dir():
            for path in sorted((folder.path / name).rglob("*")):
                small = path.is_file() and path.stat().st_size < 2**20
                content = hashlib.sha256(path.read_bytes()).hexdigest() if small else ""
                parts += [f"{name}/{path.name} {path.stat().st_size} {content}"] if path.is_file() else []
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _write_result(trainer: Trainer, folder: RunFolder, observer: Observer) -> Path:
    """Write what was learned, as a whole folder or alone."""
    from liftkit.finetune.state import whole

    recipe, trainee = trainer.recipe, trainer.trainee
    learned = trainer.average.values if trainer.average is not None else trainer.parameters
    values = {name: whole(value) for name, value in learned.items()}
    target = folder.result(recipe)
    if trainer.accelerator.is_main_process:
        adapter = learned_adapter(recipe, trainee, values, trainer.step)
        if recipe.save == "adapter":
            adapter.save(target, card(adapter, trainee.folder, "adapter"), overwrite=True)
        else:
            write_model(adapter, trainee.folder, target, observer)
    trainer.accelerator.wait_for_everyone()
    return target
