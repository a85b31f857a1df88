"""Low-level statistics: the Frechet distance of 8 x 8 patches, and an unsharp mask as the control to beat."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PATCH = 8


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Frechet distance of two samples under normal approximations (Heusel et al. 2017).

    Args:
        a, b: (n, d) and (m, d); more rows than columns, or the covariances are singular.

    Returns:
        |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), >= 0, computed in float64.
    """
    a, b = a.double(), b.double()
    covariance_a, covariance_b = torch.cov(a.T), torch.cov(b.T)
    # tr (S_a S_b)^(1/2) is the sum of the singular values of S_a^(1/2) S_b^(1/2).
    roots = torch.linalg.svdvals(_root(covariance_a) @ _root(covariance_b)).sum()
    means = (a.mean(dim=0) - b.mean(dim=0)).square().sum()
    return (means + covariance_a.trace() + covariance_b.trace() - 2 * roots).clamp(min=0).item()


def patch_frechet(images: Tensor, reference: Tensor) -> float:
    """Frechet distance of mean-removed 8 x 8 patches, second-order statistics of detail.

    Args:
        images, reference: (n, 3, H, W) in [-1, 1].

    Returns:
        >= 0; 0 for equal distributions, biased up for few images.
    """
    return frechet_distance(_patches(images), _patches(reference))


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
