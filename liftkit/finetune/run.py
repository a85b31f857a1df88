"""A finetune from recipe to result: model, data, trainer, what it leaves."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from liftkit.checkpoint.model import ModelFolder, find_model
from liftkit.data.captioned import CaptionedFolder, DemoCaptioned
from liftkit.data.source import CaptionedSource, EncodedSource
from liftkit.data.training import TrainingData
from liftkit.embedded import MODELS
from liftkit.errors import UsageError
from liftkit.finetune.encoders import fill_caches, load_vae
from liftkit.finetune.optimizer import make_optimizers
from liftkit.finetune.recipe import DatasetSource, DemoSource, FolderSource, Recipe, Source, WebDatasetSource
from liftkit.finetune.recipe_network import NEW
from liftkit.finetune.result import card, learned_adapter, write_model
from liftkit.finetune.resume import Resumption, check_model, find_resumption, model_record
from liftkit.finetune.run_folder import RunFolder
from liftkit.finetune.terms import make_perceptual
from liftkit.finetune.trainee import Trainee, open_trainee
from liftkit.finetune.trainer import Outcome, Trainer
from liftkit.formats.generations import for_latent_base
from liftkit.models.flow import open_flow
from liftkit.models.latents import LatentSpace
from liftkit.models.registry import architectures
from liftkit.options import LAST_SEED
from liftkit.progress import Observer, Silent
from liftkit.tally import Tally

SMALL_BATCH = 32
ENCODING = timedelta(hours=24)
"""How long processes wait for the one that fills the caches; NCCL would give up after ten minutes."""


@dataclass
class Finetuned:
    """What a run did.

    Args:
        outcome: how it ended.
        result: the folder it left; None where it was stopped before its last step.
        trainer: with everything still in memory.
        tallies: accounts of images, lines of metadata and caption files.
    """

    outcome: Outcome
    result: Path | None
    trainer: Trainer
    tallies: list[Tally]


def finetune(recipe: Recipe, *, resume: str | None = None, observer: Observer | None = None) -> Finetuned:
    """Train a recipe to its end, or on from a checkpoint.

    Args:
        recipe: see :class:`liftkit.finetune.recipe.Recipe`.
        resume: ``latest``, or the path of a checkpoint.
        observer: shows the progress.

    Raises:
        UsageError: bad input; nothing was trained.
        LiftkitError: training failed; checkpoints are still there.
    """
    with RunFolder(recipe.output).held():
        return _finetune(recipe, resume, observer or Silent())


def _finetune(recipe: Recipe, resume: str | None, observer: Observer) -> Finetuned:
    folder = RunFolder(recipe.output)
    folder.check(resuming=resume is not None)
    resume = folder.resumed(resume, observer.note)
    resumption = find_resumption(recipe, resume) if resume is not None else None
    if resumption is None and os.environ.get("RANK", "0") == "0":
        folder.rewind(0)
    trainer = prepare(recipe, folder, observer, resumption)
    outcome = trainer.train()
    result = None
    if not outcome.stopped:
        result = _write_result(trainer, folder, observer)
    trainer.accelerator.end_training()
    return Finetuned(outcome, result, trainer, trainer.tallies())


def prepare(recipe: Recipe, folder: RunFolder, observer: Observer, resumption: Resumption | None = None) -> Trainer:
    """Everything up to the first step: model, caches, the wrapped network, the checkpoint; then the run folder begins."""
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    accelerator = make_accelerator(recipe, folder)
    with accelerator.main_process_first():
        source = find_source(recipe, folder.path, observer)
        model = model_record(source)
        if resumption is not None:
            check_model(resumption, model)
            if accelerator.is_main_process:
                for note in resumption.notes():
                    observer.note(note)
        trainee = open_trainee(recipe, source)
        check_packages(recipe, trainee)
        data, held_out = training_data(
            recipe, trainee, folder.path, observer if accelerator.is_main_process else Silent()
        )
        fill_caches(recipe, trainee, [data, *([held_out] if held_out else [])], observer, str(accelerator.device))
    vae = load_vae(source).to(accelerator.device) if recipe.objective.perceptual == "vae" else None
    trainer = Trainer(recipe, trainee, data, held_out, vae, accelerator, folder, observer, model)
    resumed = None
    if resumption is not None:
        trainer.resume(resumption)
        resumed = {"step": resumption.step, "changes": [str(change) for change in resumption.changes]}
    if accelerator.is_main_process:
        folder.begin(recipe, [each.describe() for each in (data, held_out) if each is not None], model, resumed)
    accelerator.wait_for_everyone()
    if accelerator.log_with:
        accelerator.init_trackers("liftkit")
    if accelerator.is_main_process:
        for summary in filter(None, (tally.summary() for tally in trainer.tallies())):
            observer.note(summary)
    return trainer


def check_packages(recipe: Recipe, trainee: Trainee) -> None:
    """Raise unless what a recipe asks of other packages is there, before hours of encoding.

    Raises:
        UsageError: naming the key.
    """
    make_optimizers(trainee.parameters, recipe.optimizer, trainee.spec)
    if recipe.objective.perceptual == "lpips":
        make_perceptual("lpips", None, "cpu")
    there = available_trackers()
    missing = [name for name in recipe.trackers or () if name not in there]
    if missing:
        raise UsageError(f"trackers: {missing[0]}: not installed; pip install {missing[0]}, or leave it out")


def available_trackers() -> list[str]:
    """Names of the trackers that are installed."""
    from accelerate.tracking import get_available_trackers

    return [each.value for each in get_available_trackers()]


def chosen_trackers(recipe: Recipe) -> list[str]:
    """Where the figures of a run go beside its folder."""
    if recipe.trackers is None:
        return [name for name in available_trackers() if name == "tensorboard"]
    return list(recipe.trackers)


def make_accelerator(recipe: Recipe, folder: RunFolder) -> Any:
    """accelerate's, for a recipe.

    Raises:
        UsageError: if the batch does not divide among the processes, or the device does not do the precision.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

    # accelerate keeps the precision of a process's first run for all that follow; each of ours has its own.
    AcceleratorState._reset_state()

    # REPA's part is no part of the forward, and would be taken for unused.
    handlers = [
        DistributedDataParallelKwargs(
            find_unused_parameters=recipe.trainable.mode == "full" and not recipe.objective.repa
        ),
        InitProcessGroupKwargs(timeout=ENCODING),
    ]
    try:
        accelerator = Accelerator(
            mixed_precision=recipe.precision,
            log_with=chosen_trackers(recipe) or None,
            project_dir=str(folder.path),
            kwargs_handlers=handlers,
        )
    except (ValueError, ImportError) as error:
        raise UsageError(f"precision {recipe.precision}, trackers {chosen_trackers(recipe)}: {error}") from error
    if recipe.base.quantize != "none" and accelerator.num_processes > 1:
        raise UsageError(
            f"base.quantize: {recipe.base.quantize}: one process only, here are {accelerator.num_processes}"
        )
    if recipe.batch_size % accelerator.num_processes:
        raise UsageError(f"batch_size: {recipe.batch_size} does not divide among {accelerator.num_processes} processes")
    return accelerator


def find_source(recipe: Recipe, output: Path, observer: Observer) -> ModelFolder:
    """The folder that training begins from; an embedded model is converted into the run folder where need be, ``new`` is made
    there, and an adapter to go on from is merged into its base there."""
    if recipe.adapter is not None:
        from liftkit.formats.adapters import fuse

        merged = output / "base"
        if not merged.is_dir():
            output.mkdir(parents=True, exist_ok=True)
            fuse(recipe.adapter, recipe.model, merged, shards="link", observer=observer)
        return find_model(str(merged))
    if recipe.model == NEW:
        from liftkit.conversion.scratch import begin

        begun = output / "base"
        if not begun.is_dir():
            output.mkdir(parents=True, exist_ok=True)
            begin(begun, recipe.network.options(recipe.seed % LAST_SEED), observer)
        return find_model(str(begun))
    if recipe.model not in MODELS or recipe.space == "latent":
        return find_model(recipe.model)
    from liftkit.conversion.execute import convert

    base = output / "base"
    if not base.is_dir():
        output.mkdir(parents=True, exist_ok=True)
        convert(recipe.model, base, observer=observer, images="demo", device="cpu", color="oklab")
    return find_model(str(base))


def make_source(source: Source, crop: str = "lanczos") -> CaptionedSource:
    """Images and captions of one source of a recipe, cropped in one of the ways of :data:`liftkit.data.images.CROPS`."""
    if isinstance(source, DemoSource):
        return DemoCaptioned(source.count)
    made: EncodedSource
    if isinstance(source, FolderSource):
        made = CaptionedFolder(source.path, source.reference_column, by_folder=source.captions == "folders")
        if isinstance(made.references, EncodedSource):
            made.references.crop = crop
    elif isinstance(source, WebDatasetSource):
        from liftkit.data.shards import WebDataset

        made = WebDataset(list(source.urls))
    else:
        assert isinstance(source, DatasetSource)
        from liftkit.data.hub import HubDataset

        made = HubDataset(source.path, source.split, source.image_column, source.caption_column)
    made.crop = crop
    return made


def training_data(
    recipe: Recipe, trainee: Trainee, output: Path, observer: Observer
) -> tuple[TrainingData, TrainingData | None]:
    """Training data and, where the recipe validates and there are enough images, held-out data; not prepared yet."""
    from liftkit.data.heldout import split

    if open_flow(trainee.transformer).channels_beside:
        observer.note(
            f"{trainee.folder.name} takes a picture beside the noise, to fill or to follow, and the data has none: it is trained "
            "with empty ones, and may forget what it did with others"
        )
    choice = recipe.data
    for number, each in enumerate(choice.sources):
        if isinstance(each, FolderSource) and each.reference_column is not None and trainee.spec.reference_ids is None:
            known = sorted(spec.name for spec in architectures().values() if spec.reference_ids is not None)
            raise UsageError(
                f"data.sources.{number}.reference_column: {trainee.spec.name} cannot be trained with reference images; "
                f"{' and '.join(known)} can; leave it out"
            )
    sources = [(make_source(each, choice.crop), each.weight) for each in choice.sources]
    common: dict[str, Any] = {
        "resolution": choice.resolution or trainee.folder.image_size(),
        "multiple": token_side(trainee),
        "buckets": choice.buckets,
        "cache": choice.cache or output / "cache",
        "workers": choice.workers,
    }
    held_out = None
    if recipe.validation.every:
        sources, apart, notes = split(sources, recipe.validation.images, recipe.seed)
        for note in notes:
            observer.note(note)
        size = min(SMALL_BATCH, sum(len(source) for source, _ in apart))
        if apart:
            held_out = TrainingData(apart, batch_size=size, seed=recipe.seed, prompt_dropout=0.0, **common)
    data = TrainingData(
        sources,
        batch_size=recipe.batch_size,
        seed=recipe.seed,
        prompt_dropout=choice.prompt_dropout,
        flip=choice.flip,
        **common,
    )
    return data, held_out


def token_side(trainee: Trainee) -> int:
    """Pixels along one token."""
    if trainee.lift is not None:
        return trainee.lift.patch_size
    return LatentSpace(load_vae(trainee.folder)).factor * trainee.spec.latent_patch(trainee.transformer.config)


def _write_result(trainer: Trainer, folder: RunFolder, observer: Observer) -> Path:
    """Write what was learned, as a whole folder or alone."""
    recipe, trainee = trainer.recipe, trainer.trainee
    values = trainer.learner.learned()
    target = folder.result(recipe)
    if trainer.accelerator.is_main_process:
        adapter = learned_adapter(recipe, trainee, values, trainer.step)
        if recipe.save == "adapter":
            adapter = for_latent_base(adapter, trainee.folder)
            adapter.save(target, card(adapter, trainee.folder, "adapter"), overwrite=True)
        else:
            write_model(adapter, trainee.folder, target, observer)
    trainer.accelerator.wait_for_everyone()
    return target
