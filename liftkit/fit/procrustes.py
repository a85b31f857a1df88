"""The Procrustes fit (Eq. 9-12): the orthonormal map that carries latent tokens onto pixel tokens best."""

from __future__ import annotations

import torch
from torch import Tensor

from liftkit.color import ColorSpace
from liftkit.fit.moments import TokenMoments
from liftkit.fit.scale import check_moments, scaled_lift
from liftkit.lift import Lift
from liftkit.options import ScaleRule


def fit_procrustes(
    moments: TokenMoments, *, latent_patch: int = 2, color: ColorSpace | None = None, scale: ScaleRule = "norm"
) -> Lift:
    """``C = sum z x^T = U S V^T``, ``A = V U^T``: of all orthonormal A, the one with the smallest sum |x - s A z|^2.

    Args:
        moments: of tokens in the color space that the lift is for.
        latent_patch: side of the latent patch of one token.
        color: that color space; the paper's Oklab if left out.
        scale: ``norm`` as the paper, or ``lsq`` (:func:`liftkit.fit.scale.scales`).

    Returns:
        The lift, basis (D, r) in float64; ``figures`` holds both scales and the energy captured.

    Raises:
        ValueError: if there are fewer tokens than the rank, or no energy.
    """
    check_moments(moments, moments.latent_dim)
    basis = polar(moments.cross.T)
    return scaled_lift(basis, moments, kind="procrustes", latent_patch=latent_patch, color=color, rule=scale)


def polar(matrix: Tensor) -> Tensor:
    """The orthonormal polar factor ``U V^T`` of a tall matrix ``U S V^T``, (D, r), in float64."""
    u, _, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (u @ vt).contiguous()
