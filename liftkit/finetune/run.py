"""A finetune from recipe to result: model, data, trainer, what it leaves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from liftkit.device import launched_on_cpu
from liftkit.errors import UsageError
from liftkit.finetune.encoders import fill_caches, load_vae
from liftkit.finetune.float8 import check_float8
from liftkit.finetune.optimizer import make_optimizers
from liftkit.finetune.quantize import check_quantize
from liftkit.finetune.recipe import Recipe
from liftkit.finetune.result import card, learned_adapter, write_model
from liftkit.finetune.resume import Resumption, check_model, find_resumption, model_record
from liftkit.finetune.run_folder import RunFolder
from liftkit.finetune.sources import find_source, training_data
from liftkit.finetune.terms import make_perceptual
from liftkit.finetune.trainee import Trainee, open_trainee
from liftkit.finetune.trainer import Outcome, Trainer
from liftkit.formats.generations import for_latent_base
from liftkit.progress import Observer, Silent, first_process
from liftkit.tally import Tally

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
    if (idle := recipe.in_vain()) is not None:
        observer.note(idle)
    folder.check(resuming=resume is not None)
    resume = folder.resumed(resume, observer.note)
    resumption = find_resumption(recipe, resume) if resume is not None else None
    if resumption is None and first_process():
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
        model = model_record(source, resumption)
        if resumption is not None:
            check_model(resumption, model)
            if accelerator.is_main_process:
                for note in resumption.notes():
                    observer.note(note)
        if recipe.objective.reference_precision == "float8":
            check_float8(accelerator.device)
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
        UsageError: naming the keys.
    """
    if missing := missing_packages(recipe, trainee):
        raise UsageError("; ".join(missing))


def missing_packages(recipe: Recipe, trainee: Trainee) -> list[str]:
    """What a recipe asks of other packages and is not there, a sentence for each."""

    def problems(check: Callable[[], object]) -> list[str]:
        try:
            check()
        except UsageError as error:
            return [str(error)]
        return []

    missing = problems(lambda: make_optimizers(trainee.parameters, recipe.optimizer, trainee.spec))
    missing += problems(lambda: check_quantize(recipe.base.quantize))
    if recipe.objective.perceptual == "lpips":
        missing += problems(lambda: make_perceptual("lpips", None, "cpu"))
    there = available_trackers()
    names = [name for name in recipe.trackers or () if name not in there]
    return missing + [f"trackers: {name}: not installed; pip install {name}, or leave it out" for name in names]


def available_trackers() -> list[str]:
    """Names of the trackers that are installed."""
    from accelerate.tracking import get_available_trackers

    return [each.value for each in get_available_trackers()]


def chosen_trackers(recipe: Recipe) -> list[str]:
    """Where the figures of a run go beside its folder."""
    if recipe.trackers is None:
        return [name for name in available_trackers() if name == "tensorboard"]
    return list(recipe.trackers)


def make_accelerator(recipe: Recipe, folder: RunFolder, *, cpu: bool = False) -> Any:
    """accelerate's, for a recipe; on the processor where ``cpu`` says so.

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
            cpu=cpu or launched_on_cpu(),
            mixed_precision=recipe.precision,
            log_with=chosen_trackers(recipe) or None,
            project_dir=str(folder.path),
            kwargs_handlers=handlers,
        )
    except (ValueError, ImportError) as error:
        raise UsageError(f"precision {recipe.precision}, trackers {chosen_trackers(recipe)}: {error}") from error
    # What keeps weights beside the parameters, or in their places, which nothing shares out among processes.
    alone = {
        "base.quantize": (recipe.base.quantize, "none"),
        "base.offload": (recipe.base.offload, "none"),
        "objective.reference_precision": (recipe.objective.reference_precision, "same"),
    }
    for key, (found, off) in alone.items():
        if found != off and accelerator.num_processes > 1:
            raise UsageError(
                f"{key}: {found}: one process only, here are {accelerator.num_processes}; set it to {off}, or start one"
            )
    if recipe.batch_size % accelerator.num_processes:
        raise UsageError(f"batch_size: {recipe.batch_size} does not divide among {accelerator.num_processes} processes")
    return accelerator


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
