"""The decoder Jacobian fit: what a latent patch does to its own pixel patch, without any image.

``J = E[d x / d z]`` is the mean, over tokens, of the derivative of a pixel patch by its own latent patch, through the
VAE decoder and the color transform. ``A = polar(J)``. A linear decoder gives its own polar factor.

Forward-mode differentiation takes one direction through the decoder at a time. A probe moves the same number of many
tokens at once, spaced so far apart that their receptive fields hardly meet, and each by a random sign, so that what
still leaks from a neighbor averages out.
"""

from __future__ import annotations

from collections.abc import Callable
from math import isqrt

import torch
from torch import Tensor

from liftkit.color import ColorSpace, Oklab
from liftkit.fit.moments import TokenMoments
from liftkit.fit.procrustes import polar
from liftkit.fit.scale import scaled_lift
from liftkit.lift import Lift
from liftkit.options import ScaleRule
from liftkit.tokens import patchify, unpatchify

SPACING = 3
"""Tokens from one probe to the next; small images take what fits."""
DIRECTIONS = 16


def mean_jacobian(
    decode: Callable[[Tensor], Tensor],
    latents: Tensor,
    latent_patch: int,
    *,
    generator: torch.Generator | None = None,
    advance: Callable[[float], None] = lambda images: None,
) -> Tensor:
    """The mean derivative of a pixel patch by its own latent patch.

    Args:
        decode: normalized latents (B, C, h, w) to colors (B, 3, H, W), differentiable.
        latents: where to differentiate, (B, C, h, w); sides divisible by ``latent_patch``.
        latent_patch: side of the latent patch of one token.
        generator: of offsets and signs.
        advance: called with the number of images done.

    Returns:
        J, (D, r) float64: rows in (channel, row, column) order of the pixel patch, columns of the latent patch.
    """
    rows, columns = (size // latent_patch for size in latents.shape[-2:])
    rank = latents.shape[1] * latent_patch**2
    total, probes = torch.zeros(0), 0
    for latent in latents.split(1):
        mask, signs = _lattice(rows, columns, generator)
        chosen = mask.nonzero()[:, 0]
        columns_of_j = []
        for directions in torch.arange(rank).split(DIRECTIONS):
            count = len(directions)
            tangent_tokens = torch.zeros(count, rows * columns, rank)
            tangent_tokens[torch.arange(count), :, directions] = signs * mask
            tangent = unpatchify(tangent_tokens.to(latent), latent_patch, *latent.shape[-2:])
            moved = directional_derivative(decode, latent.repeat(count, 1, 1, 1), tangent)
            side = moved.shape[-1] // columns
            tokens = patchify(moved, side)[:, chosen.to(moved.device)].cpu().double()
            columns_of_j.append((tokens * signs[chosen, None].double()).sum(dim=1))
        image = torch.cat(columns_of_j).T
        total = image if probes == 0 else total + image
        probes += len(chosen)
        advance(1)
    return total / probes


def directional_derivative(function: Callable[[Tensor], Tensor], point: Tensor, tangent: Tensor) -> Tensor:
    """``d function(point + t tangent) / dt`` at 0: forward mode, or two reverse passes where an operator has none."""
    try:
        return torch.func.jvp(function, (point,), (tangent,))[1]
    except torch.OutOfMemoryError:
        raise
    except (NotImplementedError, RuntimeError):
        # Operators without forward mode, and functions that functorch does not know, say so in many ways. A real fault
        # shows again here.
        return torch.autograd.functional.jvp(function, point, tangent, strict=False)[1]


def fit_jacobian(
    jacobian: Tensor,
    moments: TokenMoments | None = None,
    *,
    latent_patch: int = 2,
    color: ColorSpace | None = None,
    scale: ScaleRule = "norm",
) -> Lift:
    """``A = polar(J)``.

    Args:
        jacobian: J, (D, r), from :func:`mean_jacobian` in the color space that the lift is for.
        moments: of (latent, pixel) tokens, for the scale; decoded samples will do. Without them s is the mean
            singular value of J, the best multiple of A for J.
        latent_patch: side of the latent patch of one token.
        color: the color space; the paper's Oklab if left out.
        scale: rule of the scale where there are moments.

    Raises:
        ValueError: if J has no energy, or the shapes disagree.
    """
    dim, rank = jacobian.shape
    if not jacobian.abs().max() > 0:
        raise ValueError("jacobian: the decoder does not depend on its latents")
    basis = polar(jacobian)
    if moments is not None:
        if (moments.latent_dim, moments.pixel_dim) != (rank, dim):
            raise ValueError(
                f"jacobian: J is {dim} x {rank}, the moments are of {moments.pixel_dim} and {moments.latent_dim}"
            )
        return scaled_lift(basis, moments, kind="jacobian", latent_patch=latent_patch, color=color, rule=scale)
    best = (basis * jacobian.double()).sum().item() / rank
    space = color if color is not None else Oklab()
    return Lift(basis, best, isqrt(dim // 3), latent_patch, space, {"kind": "jacobian", "scale_rule": "jacobian"})


def _lattice(rows: int, columns: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """A lattice of tokens at a random offset, (N,) bool, and random signs (N,) for them."""
    down, across = (int(torch.randint(min(SPACING, size), (1,), generator=generator)) for size in (rows, columns))
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    mask[down::SPACING, across::SPACING] = True
    signs = torch.randint(0, 2, (rows * columns,), generator=generator).float() * 2 - 1
    return mask.flatten(), signs
