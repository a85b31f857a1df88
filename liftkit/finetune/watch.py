"""Looking at a run: previews from fixed noise, and the loss on held-out images by noise level."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from liftkit.data.batch import Batch
from liftkit.data.training import TrainingData
from liftkit.errors import LiftkitError
from liftkit.finetune.learner import Learner
from liftkit.finetune.recipe import Recipe
from liftkit.finetune.run_folder import RunFolder
from liftkit.finetune.step import Objective, draw, quantile_levels, shifted
from liftkit.models.flow import FlowModel, GuidedFlow, euler
from liftkit.progress import Observer

PREVIEW_STEPS, PREVIEW_GUIDANCE = 24, 4.0
VALIDATION_SEED = 7919
"""Validation noise has a stream of its own, so that looking does not change what is trained."""


def preview(
    flow: FlowModel,
    conditioning: dict[str, Tensor],
    empty: dict[str, Tensor],
    shape: tuple[int, ...],
    recipe: Recipe,
    device: torch.device,
) -> Tensor:
    """Samples by Euler's method with guidance, always from the same noise.

    Args:
        flow: the student.
        conditioning: forward arguments of n prompts, and references where there are some.
        empty: of n empty prompts.
        shape: of one state, (C, H, W).
        recipe: says steps, guidance, seed, and the shift of the noise levels.

    Returns:
        The states at sigma = 0, (n, C, H, W), on the CPU.
    """
    choice = recipe.previews
    count = len(next(iter(conditioning.values())))
    streams = (torch.Generator().manual_seed(choice.seed + index) for index in range(count))
    x = torch.stack([torch.randn(shape, generator=stream) for stream in streams]).to(device)
    sigmas = shifted(torch.linspace(1.0, 0.0, (choice.steps or PREVIEW_STEPS) + 1), recipe.noise.shift)
    guided = GuidedFlow(flow, empty, PREVIEW_GUIDANCE if choice.guidance is None else choice.guidance)
    return euler(guided, x, sigmas.to(device), conditioning).cpu()


@torch.no_grad()
def validate(
    objective: Objective, batches: list, recipe: Recipe, seed: int, device: torch.device
) -> list[tuple[float, float]]:
    """Squared error of the denoised data by noise level.

    Args:
        objective: gives states and the student.
        batches: held-out ones; they are moved to the device in parts of ``recipe.micro_batch``.
        seed: of the noise.
        device: of the network.

    Returns:
        (sigma, mean |x_0 - xhat_0|^2), for each quantile of the training noise levels, rising.
    """
    rows = []
    for part, level in enumerate(quantile_levels(recipe.noise, recipe.validation.quantiles).tolist()):
        total = count = 0.0
        for index, batch in enumerate(batches):
            size = len(batch.images)
            for start in range(0, size, recipe.micro_batch or size):
                some = slice(start, start + (recipe.micro_batch or size))
                rows_here = batch.rows(some).to(device)
                x0, seen = objective.state(rows_here), objective.conditioning(rows_here)
                shape = (size, *x0.shape[1:])
                noise, _ = draw(shape, recipe.noise, seed + VALIDATION_SEED, part * len(batches) + index)
                sigma = torch.full((len(x0),), level, device=device)
                x_t = torch.lerp(x0, noise[some].to(device), level)
                error = x0 - (x_t - level * objective.student.velocity(x_t, sigma, **seen).float())
                total += error.square().sum().item()
                count += error.numel()
        rows.append((level, total / count))
    return rows


def preview_subjects(recipe: Recipe, data: TrainingData) -> tuple[list[str], Batch, int | None]:
    """What the previews paint: their prompts; images of the data in turns, whose size and references they have; and of data with
    pairs, the step that these come from.

    Of data with pairs it is the first step's of them, so that previews edit what the prompts speak of.
    """
    choice = recipe.previews
    first = data.first_pairs()
    captions = list(choice.prompts or ()) or data.captions(first or 0)
    if first is not None:
        images = data.batch(first, slice(0, min(choice.count, data.batch_size)))
    else:
        images, step = data.batch(0, slice(0, 1)), 0
        while len(captions) < choice.count and not choice.prompts:
            step += 1
            captions += data.captions(step)
    return [captions[index % len(captions)] for index in range(choice.count)], images, first


class Watch:
    """Looks at a learner between its steps, and writes what it sees into the folder of the run.

    Args:
        learner: whose weights are looked at.
        data: gives captions, prompts and the size of previews.
        held_out: what the error is measured on; None where the recipe does not validate.
        recipe: with the shift of the noise levels that the network sees.
        folder: of the run.
        observer: shows what was found.
    """

    def __init__(
        self,
        learner: Learner,
        data: TrainingData,
        held_out: TrainingData | None,
        recipe: Recipe,
        folder: RunFolder,
        observer: Observer,
    ) -> None:
        self.learner, self.data, self.recipe, self.folder, self.observer = learner, data, recipe, folder, observer
        self.held_out = list(_batches(held_out))
        self._error: float | None = None
        if recipe.previews.every and learner.trainee.lift is None and learner.accelerator.is_main_process:
            observer.note("previews are of pixel models alone: this run, which trains on latents, paints none")

    def preview(self, step: int) -> None:
        """Paint the prompts of the recipe as a picture, and add it to the film of the run.

        Raises:
            LiftkitError: if it is not finite.
        """
        from liftkit.report import over_time
        from liftkit.report.pictures import captioned
        from liftkit.report.saving import write_picture

        lift, recipe, device = self.learner.trainee.lift, self.recipe, self.learner.accelerator.device
        if lift is None:
            return
        captions, images, step_of = preview_subjects(recipe, self.data)
        conditioning, empty = (
            {name: value.to(device) for name, value in self.data.prompts(texts, step_of).items()}
            for texts in (captions, [""] * len(captions))
        )
        objective, images = self.learner.objective, images.to(device)
        references = objective.conditioning(images).get("references")
        if references is not None:
            conditioning["references"] = references[torch.arange(len(captions)) % len(references)]
        shape = tuple(objective.state(images).shape[1:])
        with self.learner.averaged():
            states = preview(objective.student, conditioning, empty, shape, recipe, device)
        if not states.isfinite().all():
            why = self.learner.broken_tensor() or "try precision=no"
            raise LiftkitError(f"step {step}: a preview is not finite; {why}")
        if not self.learner.accelerator.is_main_process:
            return
        path = self.folder.previews / f"step-{step:07d}.png"
        seeds = range(recipe.previews.seed, recipe.previews.seed + len(captions))
        made = [{"prompt": prompt, "seed": seed, "step": step} for prompt, seed in zip(captions, seeds)]
        painted = lift.color.decode(states)
        write_picture(captioned(painted, captions, f"step {step} of {recipe.steps}", 8), path, made)
        over_time.add_column(self.folder.previews / over_time.NAME, step, painted, captions)
        self.folder.log({"step": step, "preview": str(path.relative_to(self.folder.path))})
        self.observer.note(f"step {step}: preview {path}")

    def validate(self, step: int) -> None:
        """Measure the error on held-out images, where there are any."""
        if not self.held_out:
            return
        accelerator = self.learner.accelerator
        with self.learner.averaged():
            rows = validate(self.learner.objective, self.held_out, self.recipe, self.recipe.seed, accelerator.device)
        accelerator.log({f"validation/sigma_{sigma:.3f}": error for sigma, error in rows}, step=step)
        if accelerator.is_main_process:
            self.folder.log({"step": step, "validation": [[sigma, error] for sigma, error in rows]})
            mean = sum(error for _, error in rows) / len(rows)
            before = f" ({self._error:.4f} before)" if self._error is not None else ""
            self._error = mean
            self.observer.note(f"step {step}: error on held-out images {mean:.4f}{before}")


def _batches(held_out: TrainingData | None) -> Iterator[Batch]:
    """All of the held-out images once."""
    if held_out is not None:
        for step in range(-(-sum(len(source) for source in held_out.sources) // held_out.batch_size)):
            yield held_out.batch(step)
