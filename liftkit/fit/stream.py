"""One pass over images: tokens of the VAE's latents and of the pixels, into moments."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from liftkit.color import ColorSpace
from liftkit.data.images import ImageSource, batches
from liftkit.errors import UsageError
from liftkit.fit.moments import TokenMoments
from liftkit.models.latents import LatentSpace
from liftkit.progress import Observer, Silent
from liftkit.tokens import patchify

HELD_OUT = 8
"""Every 8th batch is held out of the fit, for honest figures."""


@dataclass
class Collected:
    """Moments in a colour space without normalisation, and what they came from.

    Args:
        fitted: moments to fit on.
        held_out: moments of images that no fit sees.
        images: images that were used.
    """

    fitted: TokenMoments
    held_out: TokenMoments
    images: int


@torch.no_grad()
def collect(
    space: LatentSpace,
    source: ImageSource,
    color: type[ColorSpace],
    *,
    latent_patch: int,
    resolution: int,
    batch_size: int = 16,
    observer: Observer | None = None,
) -> Collected:
    """Encode images once and gather the moments of their token pairs.

    Args:
        space: the model's latent space; its VAE's device does the work.
        source: of images.
        color: the pixels' colour space; moments are of its plain values, so that any normalisation can follow
            (:func:`normalised`).
        latent_patch: side of the latent patch of one token.
        resolution: side of the images at most, in pixels.

    Raises:
        UsageError: if no image could be used.
    """
    side = space.factor * latent_patch
    plain = color((0.0, 0.0, 0.0), 1.0)
    fitted, held_out = (TokenMoments(space.channels * latent_patch**2, 3 * side * side) for _ in range(2))
    with (observer or Silent()).stage("fit: encoding images", len(source), "images") as advance:
        for index, batch in enumerate(batches(source.images(resolution, side), batch_size)):
            images = batch.to(space.vae.device)
            pair = token_pair(space, images, plain, latent_patch)
            (held_out if index % HELD_OUT == HELD_OUT - 1 else fitted).update(*pair)
            advance(len(batch))
    if fitted.images == 0:
        raise UsageError(f"no usable image: {source.skipped.summary() or 'the source is empty'}")
    return Collected(fitted, held_out, fitted.images + held_out.images)


def token_pair(space: LatentSpace, images: Tensor, color: ColorSpace, latent_patch: int) -> tuple[Tensor, Tensor]:
    """The tokens of images: latent (B, N, r) and pixel (B, N, D), patch for patch, on the CPU."""
    latents = patchify(space.encode(images), latent_patch)
    pixels = patchify(color.encode(images), space.factor * latent_patch)
    return latents.cpu(), pixels.cpu()


def fitted_color(color: type[ColorSpace], moments: TokenMoments) -> ColorSpace:
    """The space normalised to the images behind moments of its plain values: mean per channel, one std for all."""
    per_channel = moments.pixel_dim // 3
    total = moments.pixel_sum.view(3, per_channel).sum(dim=1)
    return color.from_statistics(moments.count * per_channel, total, moments.pixel_gram.trace().item())


def normalised(moments: TokenMoments, color: ColorSpace) -> TokenMoments:
    """Moments of pixels ``(x - mean) / std`` from moments of plain values."""
    mean = torch.tensor(color.mean, dtype=torch.float64).repeat_interleave(moments.pixel_dim // 3)
    result = TokenMoments(moments.latent_dim, moments.pixel_dim)
    result.count, result.images = moments.count, moments.images
    result.latent_sum, result.latent_gram = moments.latent_sum, moments.latent_gram
    shifted = torch.outer(mean, moments.pixel_sum)
    gram = moments.pixel_gram - shifted - shifted.T + moments.count * torch.outer(mean, mean)
    result.pixel_sum = (moments.pixel_sum - moments.count * mean) / color.std
    result.pixel_gram = gram / color.std**2
    result.cross = (moments.cross - torch.outer(moments.latent_sum, mean)) / color.std
    return result
