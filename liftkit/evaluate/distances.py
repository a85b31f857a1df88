"""Distances of two sets of features, as published figures take them; the Frechet distance is in :mod:`.patches`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SUBSETS, SUBSET = 100, 1000
"""Of KID: how many subsets, and of how many images at most."""
MOST_PAIRS = 2**25
"""Of images, whose kernel is held in memory: 256 MB."""
SIGMA = 10.0
"""Bandwidth of CMMD's kernel."""


def kernel_distance(features: Tensor, reference: Tensor) -> float:
    """KID (Binkowski et al. 2018): the unbiased squared MMD of the kernel ``(x y / d + 1)^3``, mean of 100 random subsets.

    Args:
        features: (n, d), n >= 2.
        reference: (m, d), m >= 2.

    Returns:
        About 0 for equal distributions, where it may be below. Subsets have 1000 images, or as many as the smaller set has;
        they are the same in every call.
    """
    x, y = features.double(), reference.double()
    size = min(SUBSET, len(x), len(y))
    within, others, across = _kernel(x, x), _kernel(y, y), _kernel(x, y)
    generator = torch.Generator().manual_seed(0)
    total = 0.0
    for _ in range(SUBSETS):
        i = torch.randperm(len(x), generator=generator)[:size]
        j = torch.randperm(len(y), generator=generator)[:size]
        total += _unbiased_mean(within(i, i)) + _unbiased_mean(others(j, j)) - 2 * across(i, j).mean().item()
    return total / SUBSETS


def clip_discrepancy(features: Tensor, reference: Tensor) -> float:
    """CMMD (Jayasumana et al. 2024): the squared MMD of a Gaussian kernel, sigma 10, with the diagonals, x 1000.

    Args:
        features: (n, d), of unit length.
        reference: (m, d), likewise.

    Returns:
        >= 0 but for rounding; of few images biased up.
    """
    x, y = features.double(), reference.double()
    return 1000.0 * (_gaussian_mean(x, x) + _gaussian_mean(y, y) - 2 * _gaussian_mean(x, y))


def _kernel(x: Tensor, y: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """KID's kernel of some rows of x and some of y, by their places; small sets are multiplied once."""

    def cubic(x: Tensor, y: Tensor) -> Tensor:
        kernel = x @ y.T / x.shape[1] + 1.0
        return kernel * kernel * kernel

    if len(x) * len(y) > MOST_PAIRS:
        return lambda i, j: cubic(x[i], y[j])
    whole = cubic(x, y)
    return lambda i, j: whole[i[:, None], j]


def _unbiased_mean(kernel: Tensor) -> float:
    """Of all but the diagonal."""
    size = len(kernel)
    return ((kernel.sum() - kernel.trace()) / (size * (size - 1))).item()


def _gaussian_mean(x: Tensor, y: Tensor) -> float:
    """Mean of the kernel over all pairs, some rows at a time."""
    total = sum((torch.cdist(part, y).square() / (-2 * SIGMA**2)).exp().sum().item() for part in x.split(1024))
    return total / (len(x) * len(y))
