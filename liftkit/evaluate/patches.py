"""Frechet distances of normal approximations, on patches of images; and an unsharp mask, the control to beat."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from liftkit.evaluate.batches import batches

PATCH = 8
MOST_PATCHES = 2**18
"""Patches that a covariance rests on at most; of larger sets every k-th patch is taken."""


class Gaussian(NamedTuple):
    """A sample seen as a normal distribution, in float64.

    Args:
        mean: (d,).
        covariance: (d, d).
    """

    mean: Tensor
    covariance: Tensor


def gaussian(rows: Tensor) -> Gaussian:
    """Mean and covariance of (n, d); more rows than columns, or the covariance is singular."""
    rows = rows.double()
    return Gaussian(rows.mean(dim=0), torch.cov(rows.T))


def frechet(a: Gaussian, b: Gaussian) -> float:
    """Frechet distance of two normal distributions (Heusel et al. 2017).

    Returns:
        |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), >= 0.
    """
    # tr (S_a S_b)^(1/2) is the sum of the singular values of S_a^(1/2) S_b^(1/2).
    roots = torch.linalg.svdvals(_root(a.covariance) @ _root(b.covariance)).sum()
    means = (a.mean - b.mean).square().sum()
    return (means + a.covariance.trace() + b.covariance.trace() - 2 * roots).clamp(min=0).item()


def patch_frechet(images: Tensor, reference: Tensor) -> float:
    """Frechet distance of mean-removed 8 x 8 patches, second-order statistics of detail.

    Args:
        images, reference: (n, 3, H, W) in [-1, 1], or uint8.

    Returns:
        >= 0; 0 for equal distributions, biased up for few images.
    """
    return frechet(patch_gaussian(images), patch_gaussian(reference))


def patch_gaussian(images: Tensor) -> Gaussian:
    """The mean-removed 8 x 8 patches of (n, 3, H, W) images as a normal distribution, d = 192."""
    each = (images.shape[-2] // PATCH) * (images.shape[-1] // PATCH)
    stride = -(-len(images) * each // MOST_PATCHES)
    return gaussian(torch.cat([_patches(part)[::stride] for part in batches(images)]))


def unsharp(images: Tensor, amount: float) -> Tensor:
    """``y + amount (y - box3x3(y))``, clamped to [-1, 1]: what sharpening alone can do."""
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    return (images + amount * (images - blurred)).clamp(-1.0, 1.0)


def _patches(images: Tensor) -> Tensor:
    cut = F.unfold((images + 1.0) / 2.0, PATCH, stride=PATCH)
    tokens = cut.transpose(1, 2).reshape(-1, 3, PATCH * PATCH)
    return (tokens - tokens.mean(dim=2, keepdim=True)).flatten(1)


def _root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T
