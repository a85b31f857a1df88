"""The Procrustes fit (Eq. 9-12): the orthonormal map that carries latent tokens onto pixel tokens best."""

from __future__ import annotations

from math import isqrt

import torch
from torch import Tensor

from liftkit.color import ColorSpace, Oklab
from liftkit.fit.moments import TokenMoments
from liftkit.lift import Lift


def fit_procrustes(moments: TokenMoments, *, latent_patch: int = 2, color: ColorSpace | None = None) -> Lift:
    """``C = sum z x^T = U S V^T``, ``A = V U^T``; the scale matches the energy that A captures.

    ::

        s     = sqrt(tr(A^T G_x A) / sum |z|^2)      the paper's, used
        s_lsq = trace(S) / sum |z|^2                 least squares, reported

    Args:
        moments: of tokens in the colour space that the lift is for.
        latent_patch: side of the latent patch of one token.
        color: that colour space; the paper's Oklab if left out.

    Returns:
        The lift, basis (D, r) in float64; ``figures`` holds both scales and the energy captured.

    Raises:
        ValueError: if there are fewer tokens than the rank, or no energy.
    """
    if moments.count < moments.latent_dim:
        raise ValueError(
            f"procrustes: {moments.count} tokens cannot determine a basis of rank {moments.latent_dim}; give more images"
        )
    energy = moments.latent_gram.trace()
    if not energy > 0 or not moments.pixel_gram.trace() > 0:
        raise ValueError("procrustes: latents or pixels have no energy; are all images of one colour?")
    basis, singular_values = procrustes_basis(moments.cross)
    captured = (basis * (moments.pixel_gram @ basis)).sum()
    return Lift(
        basis=basis,
        scale=(captured / energy).sqrt().item(),
        patch_size=isqrt(moments.pixel_dim // 3),
        latent_patch=latent_patch,
        color=color if color is not None else Oklab(),
        figures={
            "kind": "procrustes",
            "images": moments.images,
            "tokens": moments.count,
            "scale_least_squares": (singular_values.sum() / energy).item(),
            "energy_captured": (captured / moments.pixel_gram.trace()).item(),
        },
    )


def procrustes_basis(cross: Tensor) -> tuple[Tensor, Tensor]:
    """``A = V U^T`` of ``C = U S V^T``: (D, r), and the singular values S (r,), in float64."""
    u, singular_values, vt = torch.linalg.svd(cross.double(), full_matrices=False)
    return (u @ vt).T.contiguous(), singular_values
