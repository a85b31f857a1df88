"""Samples of several models from the same noise.

Image i of every pixel model starts at the noise eps of seed + i, and of every latent model at ``A^T eps``: what differs
between them is then what the models do, not luck. By Theorem 1 a conversion that was not trained follows its source.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from liftkit.checkpoint.record import versions
from liftkit.color import to_uint8
from liftkit.data.cache import TensorCache
from liftkit.errors import UsageError
from liftkit.evaluate.cache import digest, tensor_digest
from liftkit.evaluate.entries import Entry
from liftkit.lift import Lift
from liftkit.models.loaded import Loaded
from liftkit.models.sampling import sample
from liftkit.options import Guidance, SampleOptions, Sampler, Solver
from liftkit.progress import Observer


@dataclass(frozen=True)
class Settings:
    """How models are sampled.

    Args:
        prompts: one sample each.
        size: side of the images in pixels.
        seed: of sample 0; sample i has ``seed + i``.
        guidance: of all models alike.
        solver: of all models alike; their schedulers' own if None.
        device: to sample on.
        batch_size: samples at once.
        cache: a folder in which samples are kept, by what they follow from.
    """

    prompts: tuple[str, ...]
    size: int
    seed: int
    guidance: Guidance
    solver: Solver | None
    device: str
    batch_size: int
    cache: Path


def tied_samples(
    entry: Entry, tie: Lift, steps: int | None, settings: Settings, observer: Observer, label: str
) -> Tensor:
    """Samples of a model from the common noise.

    Args:
        entry: the model.
        tie: whose A carries pixel noise to a latent model's.
        steps: of its sampler; the pipeline's own if None.
        settings: that all models share.
        label: to show.

    Returns:
        uint8 (n, 3, S, S).

    Raises:
        UsageError: if its samples are not finite.
    """
    cache = TensorCache(settings.cache / "samples", digest(_origin(entry, tie, steps, settings)))
    keys = [digest([prompt, settings.seed + index]) for index, prompt in enumerate(settings.prompts)]
    todo = [index for index, key in enumerate(keys) if key not in cache]
    if todo:
        loaded = entry.load(settings.device)
        with observer.stage(f"sample: {label}", len(keys), "images") as advance:
            advance(len(keys) - len(todo))
            try:
                for start in range(0, len(todo), settings.batch_size):
                    part = todo[start : start + settings.batch_size]
                    images = _sample(loaded, entry, tie, part, steps, settings)
                    cache.add({keys[index]: {"image": image} for index, image in zip(part, images)})
                    advance(len(part))
            finally:
                cache.flush()
    return torch.stack([cache.get(key)["image"] for key in keys])


def pixel_noise(indices: Sequence[int], height: int, width: int, seed: int) -> Tensor:
    """eps, (n, 3, H, W): image i from the stream of ``seed + i``, as ``liftkit sample`` draws it for pixels."""
    streams = (torch.Generator().manual_seed(seed + index) for index in indices)
    return torch.stack([torch.randn(3, height, width, generator=stream) for stream in streams])


def _origin(entry: Entry, tie: Lift, steps: int | None, settings: Settings) -> dict[str, object]:
    """All that a model's samples follow from, but for prompts and seeds."""
    return {
        "model": entry.digest,
        "tie": tensor_digest(tie.basis) if entry.lift is None else None,
        "size": settings.size,
        "steps": steps,
        "guidance": settings.guidance.record,
        **({} if settings.solver is None else {"solver": settings.solver}),
        "device": torch.device(settings.device).type,
        "versions": versions(),
    }


def _sample(
    loaded: Loaded, entry: Entry, tie: Lift, indices: list[int], steps: int | None, settings: Settings
) -> Tensor:
    noise = pixel_noise(indices, settings.size, settings.size, settings.seed)
    images = sample(
        loaded,
        [settings.prompts[index] for index in indices],
        SampleOptions(
            steps=steps,
            guidance=settings.guidance,
            sampler=Sampler(solver=settings.solver),
            height=settings.size,
            width=settings.size,
            batch_size=settings.batch_size,
        ),
        noise=noise if entry.lift is not None else tie.lower(noise),
    )
    if not torch.isfinite(images).all():
        raise UsageError(f"{entry.source}: its samples hold values that are not finite; was its training cut short?")
    return to_uint8(images)
