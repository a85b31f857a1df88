"""What a model takes the finished picture to be at each of its steps: ``x_0 = x_t - sigma u``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from liftkit.models.latents import LatentSpace
from liftkit.models.loaded import Loaded
from liftkit.models.scheduler import noise_level


@dataclass(frozen=True)
class At:
    """Which step of a sampler.

    Args:
        index: from 0.
        count: of all steps; Heun's method has two for most noise levels.
        sigma: noise level of the state, in [0, 1].
    """

    index: int
    count: int
    sigma: float


@contextmanager
def watched(model: Loaded, each: Callable[[At, Callable[[], Tensor]], None], height: int, width: int) -> Iterator[None]:
    """Within it, every step of the model's pipeline is reported before it is taken.

    Args:
        model: the model.
        each: called with the step and a function that makes the denoised estimate, (B, 3, H, W) in [-1, 1], on the CPU.
            What it raises ends the pipeline's call.
        height, width: of the images in pixels.
    """
    if any(each.__name__ in model.flow.architecture.several for each in type(model.pipeline).__mro__):
        # An estimate is of one picture: the steps are not shown.
        yield
        return
    scheduler = model.pipeline.scheduler
    step = scheduler.step

    # Wrapped, because pipelines read its signature to see what a scheduler takes.
    @functools.wraps(step)
    def reported(model_output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
        if scheduler.step_index is None:
            scheduler._init_step_index(timestep)
        # Where there is a start image, the first step goes to it, whatever the network says.
        late = 1 if getattr(scheduler, "skipped", 0) else 0
        if scheduler.step_index >= late:
            sigma = noise_level(scheduler, scheduler.step_index)
            sign = -1.0 if scheduler.config.get("invert_sigmas") else 1.0
            at = At(scheduler.step_index - late, len(scheduler.timesteps) - late, sigma)
            each(at, lambda: estimate(model, sample.float() - sign * sigma * model_output.float(), height, width))
        return step(model_output, timestep, sample, *args, **kwargs)

    scheduler.step = reported
    try:
        yield
    finally:
        del scheduler.step


@torch.no_grad()
def estimate(model: Loaded, state: Tensor, height: int, width: int) -> Tensor:
    """A clean state of the pipeline as images.

    Args:
        state: ``latents`` of the model's pipeline, of any layout.

    Returns:
        (B, 3, H, W) in [-1, 1], on the CPU.
    """
    flow, vae = model.flow, model.pipeline.vae
    if flow.is_pixel:
        fold = vae.config.fold
        folded = flow.state_of_pipeline(state, height // fold, width // fold)
        images: Tensor = vae.color.decode(F.pixel_shuffle(folded, fold))
        return images.float().cpu().clamp(-1.0, 1.0)
    space = LatentSpace(vae, flow.architecture.latent_statistics)
    latents = flow.state_of_pipeline(state, height // space.factor, width // space.factor)
    return space.decode(latents).cpu()
