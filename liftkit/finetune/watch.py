"""Looking at a run: previews from fixed noise, and the loss on held-out images by noise level."""

from __future__ import annotations

import torch
from torch import Tensor

from liftkit.data.training import TrainingData
from liftkit.finetune.recipe import Recipe
from liftkit.finetune.step import Objective, draw, quantile_levels, shifted
from liftkit.models.flow import FlowModel

PREVIEW_STEPS, PREVIEW_GUIDANCE = 24, 4.0
VALIDATION_SEED = 7919
"""Validation noise has a stream of its own, so that looking does not change what is trained."""


@torch.no_grad()
def preview(
    flow: FlowModel,
    prompts: dict[str, Tensor],
    empty: dict[str, Tensor],
    shape: tuple[int, ...],
    recipe: Recipe,
    device: torch.device,
) -> Tensor:
    """Samples by Euler's method with guidance, always from the same noise.

    Args:
        flow: the student.
        prompts: forward arguments of n prompts.
        empty: of the empty prompt, once.
        shape: of one state, (C, H, W).
        recipe: says steps, guidance, seed, and the shift of the noise levels.

    Returns:
        The states at sigma = 0, (n, C, H, W), on the CPU.
    """
    choice = recipe.previews
    count = len(next(iter(prompts.values())))
    streams = (torch.Generator().manual_seed(choice.seed + index) for index in range(count))
    x = torch.stack([torch.randn(shape, generator=stream) for stream in streams]).to(device)
    steps = choice.steps or PREVIEW_STEPS
    guidance = PREVIEW_GUIDANCE if choice.guidance is None else choice.guidance
    sigmas = shifted(torch.linspace(1.0, 0.0, steps + 1), recipe.noise.shift)
    both = {name: torch.cat([value, empty[name].expand_as(value)]) for name, value in prompts.items()}
    for now, after in zip(sigmas[:-1].tolist(), sigmas[1:].tolist()):
        sigma = torch.full((2 * count,), now, device=device)
        with_prompt, without = flow.velocity(torch.cat([x, x]), sigma, **both).float().chunk(2)
        x = x + (after - now) * (without + guidance * (with_prompt - without))
    return x.cpu()


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


def preview_prompts(recipe: Recipe, data: TrainingData) -> list[str]:
    """What the previews paint."""
    count = recipe.previews.count
    given = recipe.previews.prompts
    if given is not None:
        return [given[index % len(given)] for index in range(count)]
    captions: list[str] = []
    step = 0
    while len(captions) < count:
        captions += data.captions(step)
        step += 1
    return captions[:count]
