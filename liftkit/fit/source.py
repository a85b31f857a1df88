"""The data of a fit: the model's VAE, and images, drawn latents or the model's own samples for it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from liftkit.data.images import open_images
from liftkit.data.prompts import read_prompts
from liftkit.fit.pairs import EncodedImages, PairSource, given_latents, normal_latents
from liftkit.fit.subject import MOST_IMAGES, Subject
from liftkit.models.latents import LatentSpace
from liftkit.models.load import load_component, load_vae
from liftkit.models.sampling import latent_samples
from liftkit.options import FitOptions
from liftkit.progress import Observer


def open_source(subject: Subject, options: FitOptions, observer: Observer) -> PairSource:
    """Where the pairs of a fit come from; ``options`` have their automatic choices made.

    Raises:
        UsageError: if there are no images, or no prompts.
    """
    assert options.resolution is not None
    space = open_latents(subject, options.device, options.vae)
    count = MOST_IMAGES if options.num_images == "auto" else options.num_images or 0
    if options.latents == "images":
        assert options.images is not None
        source = open_images(options.images, count, options.seed)
        return EncodedImages(space, source, options.resolution, subject.latent_patch)
    if options.latents == "normal":
        return normal_latents(space, options.resolution, count, options.seed)
    prompts = read_prompts(options.prompts)
    prompts = [prompts[index % len(prompts)] for index in range(count)]
    latents = latent_samples(subject.model, prompts, options.resolution, options.device, options.seed, observer)
    digest = hashlib.sha256("\n".join(prompts).encode()).hexdigest()
    described = {
        "source": "model samples",
        "prompts": len(set(prompts)),
        "resolution": options.resolution,
        "digest": digest,
    }
    return given_latents(space, latents, {**described, "seed": options.seed})


def open_latents(subject: Subject, device: str, vae: Path | None = None) -> LatentSpace:
    """The model's VAE, or another one of the same latent space, in float32 on a device.

    Raises:
        UsageError: if diffusers cannot load it.
    """
    loaded = load_component(subject.model, "vae", torch.float32) if vae is None else load_vae(vae)
    return LatentSpace(loaded.to(device).requires_grad_(False), subject.spec.latent_statistics)
