"""Sample images from a loaded pipeline, latent or converted, through its stock diffusers class."""

from __future__ import annotations

import inspect
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from liftkit.checkpoint.model import ModelFolder
from liftkit.checkpoint.text import check_prompts
from liftkit.errors import UsageError
from liftkit.models.broken import broken
from liftkit.models.editing import reference_arguments, size_for, start_from
from liftkit.models.flow import FlowModel
from liftkit.models.guidance import guided
from liftkit.models.loaded import Loaded, load_pipeline
from liftkit.models.mixin import AsymMixin
from liftkit.models.registry import architecture
from liftkit.models.scheduler import with_clamp, with_shift, with_solver, with_start
from liftkit.options import STRENGTH, SampleOptions, Sampler
from liftkit.progress import Observer


class _Watch:
    """Looks at what a pipeline has after each step: NaN would end as a black picture.

    Args:
        pipeline: of diffusers.
        then: a callback to be called in its turn.
    """

    def __init__(self, pipeline: Any, then: Any = None) -> None:
        self.then = then
        known = inspect.signature(pipeline.__call__).parameters
        names = [name for name in getattr(pipeline, "_callback_tensor_inputs", ()) if name in WATCHED]
        watched = {"callback_on_step_end": self, "callback_on_step_end_tensor_inputs": names}
        self.arguments = {key: value for key, value in watched.items() if key in known}

    def __call__(self, pipeline: Any, step: int, time: Any, values: dict[str, Any]) -> dict[str, Any]:
        """After a step."""
        for name, component in WATCHED.items():
            tensor = values.get(name)
            if tensor is not None and not torch.isfinite(tensor).all():
                raise UsageError(broken(pipeline, component, f"{name} of step {step + 1}"))
        return self.then(pipeline, step, time, values) if self.then is not None else {}


WATCHED = {"prompt_embeds": "text_encoder", "pooled_prompt_embeds": "text_encoder", "latents": "transformer"}
"""Tensors of a pipeline, the first to be made first, and the component that makes them."""


def state_noise(flow: FlowModel, seeds: Sequence[int], height: int, width: int, factor: int) -> Tensor:
    """Standard normal states, each from its own stream so that batches do not change it.

    Args:
        flow: decides the state's shape: (n, 3, H, W) for pixels, (n, C, H / factor, W / factor) for latents.
        seeds: of the n images.
        height, width: of the images.
        factor: the VAE's.
    """
    shape = (3, height, width) if flow.is_pixel else (flow.channels, height // factor, width // factor)
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


@torch.no_grad()
def sample(
    model: Loaded,
    prompts: list[str],
    options: SampleOptions | None = None,
    *,
    seeds: Sequence[int] | None = None,
    noise: Tensor | None = None,
    advance: Any = lambda amount: None,
    **more: Any,
) -> Tensor:
    """Images for prompts.

    Args:
        model: a stock pipeline over a latent or a lifted transformer.
        prompts: one image each.
        options: how; the device is the model's, and so is the adapter.
        seeds: of each image; counting up from the options' own if left out.
        noise: starting states, image-shaped (see :func:`state_noise`); drawn from the seeds if left out.
        advance: called with the number of images done.
        more: further arguments of the pipeline.

    Returns:
        (n, 3, H, W) in [-1, 1], on the CPU.

    Raises:
        UsageError: if the model cannot be sampled so; or naming the component that gives numbers which are not finite.
    """
    options = options or SampleOptions()
    check_prompts([*prompts, options.negative or ""])
    pipeline, flow = model.pipeline, model.flow
    height, width = size_for(options, model.size, model.multiple)
    seeds = seeds if seeds is not None else range(options.seed, options.seed + len(prompts))
    if noise is None:
        noise = state_noise(flow, seeds, height, width, pipeline.vae_scale_factor)
    known = inspect.signature(pipeline.__call__).parameters
    arguments = _arguments(model, options, known) | more
    pictures = reference_arguments(options.pictures.references, known, height, width)
    # Not all pipelines share reference images among the prompts of a batch.
    batch_size = 1 if pictures else options.batch_size
    images = []
    watch = _Watch(pipeline, arguments.pop("callback_on_step_end", None))
    with walked(model, options, height, width):
        for start in range(0, len(prompts), batch_size):
            part = slice(start, start + batch_size)
            against = {} if options.negative is None else _negative(model, options.negative, len(prompts[part]))
            if hasattr(pipeline.scheduler, "generators"):
                pipeline.scheduler.generators = [_step_stream(seed) for seed in seeds[part]]
            with guided(pipeline, options.guidance, **arguments):
                output = pipeline(
                    prompt=prompts[part],
                    height=height,
                    width=width,
                    latents=flow.pipeline_state(noise[part].to(pipeline._execution_device)),
                    output_type="pt",
                    **watch.arguments,
                    **arguments,
                    **against,
                    **pictures,
                )
            if not torch.isfinite(output.images).all():
                raise UsageError(broken(pipeline, "vae", "its decoder's picture"))
            images.append(output.images.float().cpu() * 2.0 - 1.0)
            advance(len(images[-1]))
    return torch.cat(images)


def _arguments(model: Loaded, options: SampleOptions, known: Container[str]) -> dict[str, Any]:
    """Of a stock pipeline's call, those that it knows, but for prompts, sizes and states."""
    spec = model.flow.architecture
    choices = {
        "num_inference_steps": options.steps,
        spec.guidance_argument: options.guidance.scale,
        "max_sequence_length": model.text_length,
        **spec.call,
    }
    return {key: value for key, value in choices.items() if value is not None and key in known}


def _step_stream(seed: int) -> torch.Generator:
    """Of the noise that a stochastic solver adds to an image: another stream than its starting state's."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence([seed, 1]).generate_state(1, np.uint64)[0]))


def _negative(model: Loaded, text: str, count: int) -> dict[str, Any]:
    """The arguments of a stock pipeline that say what not to paint.

    Raises:
        UsageError: if it takes none.
    """
    pipeline = model.pipeline
    known = inspect.signature(pipeline.__call__).parameters
    if "negative_prompt" in known:
        return {"negative_prompt": [text] * count}
    if "negative_prompt_embeds" not in known or pipeline.config.get("is_distilled") not in (None, False):
        raise UsageError(f"--negative: {type(pipeline).__name__} takes no negative prompt; leave it out")
    spec = architecture(type(pipeline.transformer).__name__)
    found = spec.prompts(pipeline, [text] * count, model.text_length)
    return {"negative_prompt_embeds": found["encoder_hidden_states"]}


@contextmanager
def walked(model: Loaded, options: SampleOptions, height: int, width: int) -> Iterator[None]:
    """Within it a pipeline walks from noise or a start image to an image of a size in pixels as the options say.

    Raises:
        UsageError: if its scheduler has no shift or cannot take the solver, or something of pixels is asked of a latent model.
    """
    pipeline, sampler = model.pipeline, options.sampler
    scheduler = pipeline.scheduler
    heads = [each.lift for each in pipeline.components.values() if isinstance(each, AsymMixin)]
    floors = [head.sigma_min for head in heads]
    chosen, pictures = _scheduler(model, sampler, height, width), options.pictures
    if pictures.image is not None:
        start = start_from(pipeline, model.flow, pictures.image, height, width)
        chosen = with_start(chosen, start, pictures.strength or STRENGTH)
    pipeline.scheduler = chosen
    for head in heads:
        head.sigma_min = sampler.sigma_floor or head.sigma_min
    try:
        yield
    finally:
        pipeline.scheduler = scheduler
        for head, floor in zip(heads, floors):
            head.sigma_min = floor


def _scheduler(model: Loaded, sampler: Sampler, height: int, width: int) -> Any:
    pipeline, pixel = model.pipeline, model.flow.is_pixel
    for flag, given, possible, why in (
        ("--clamp", sampler.clamp, pixel, "latents, which have no colors to clamp"),
        (
            "--sigma-floor",
            sampler.sigma_floor,
            model.flow.is_lifted,
            "latents, whose velocity is not recovered by a division",
        ),
    ):
        if given and not possible:
            raise UsageError(f"{flag}: the model paints {why}; leave it out")
    scheduler, shift = pipeline.scheduler, sampler.shift_for(height, width)
    if sampler.solver is not None:
        more = {} if sampler.eta is None else {"eta": sampler.eta}
        scheduler = with_solver(scheduler, sampler.solver, **more)
    if shift is not None:
        scheduler = with_shift(scheduler, shift)
    if sampler.clamp is not None and pixel:
        scheduler = with_clamp(scheduler, pipeline.vae.color.to_dict() if sampler.clamp else None)
    return scheduler


@torch.no_grad()
def latent_samples(
    model: ModelFolder, prompts: list[str], resolution: int, device: str, seed: int, observer: Observer
) -> Tensor:
    """The final, still normalized latents of a latent model's own samples, (n, C, h, w) on the CPU.

    They are taken from the stock pipeline after its last step, before it undoes the normalization.
    """
    loaded = load_pipeline(model, device)
    flow = loaded.flow
    last: list[Tensor] = []
    side = resolution // loaded.pipeline.vae_scale_factor

    def keep(pipe: Any, step: int, _: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
        if step == pipe.num_timesteps - 1:
            last.append(flow.state_of_pipeline(values["latents"].float().cpu(), side, side))
        return {}

    with observer.stage("fit: sampling the latent model", len(prompts), "images") as advance:
        options = SampleOptions(seed=seed, height=resolution, width=resolution)
        sample(loaded, prompts, options, advance=advance, callback_on_step_end=keep)
    return torch.cat(last)


def check_options(model: Loaded, options: SampleOptions) -> None:
    """Raise unless a model can be sampled as the options say: in whole tokens, by a scheduler that it can have.

    Raises:
        UsageError: naming the flag.
    """
    side, sizes = model.multiple, (("--height", options.height), ("--width", options.width))
    for flag, value in sizes:
        if value is not None and value % side:
            raise UsageError(f"{flag} {value}: not a multiple of the {side} pixels of one token")
    _scheduler(model, options.sampler, side, side)
