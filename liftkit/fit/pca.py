"""The PCA fit (Eq. 8): the subspace that holds most pixel energy, as it is or turned onto the latents."""

from __future__ import annotations

from math import isqrt

import torch
from torch import Tensor

from liftkit.color import ColorSpace, Oklab
from liftkit.fit.alignment import top_eigenvectors
from liftkit.fit.moments import TokenMoments
from liftkit.fit.procrustes import polar
from liftkit.fit.rank import auto_rank
from liftkit.fit.scale import check_moments, scaled_lift
from liftkit.lift import Lift, Space
from liftkit.options import Auto, ScaleRule


def fit_pca(
    moments: TokenMoments,
    *,
    rank: int | Auto | None = None,
    latent_patch: int = 2,
    color: ColorSpace | None = None,
    scale: ScaleRule = "norm",
    space: Space = "pixel",
) -> Lift:
    """The top eigenvectors Q of ``G_x = sum x x^T``, uncentered.

    For a conversion (``rank`` left out) they are rotated onto the latents inside their subspace,
    ``A = Q polar(Q^T C^T)``, at the latents' own rank. For training from scratch (``rank`` given) they are used as
    they are, largest first, with s = 1; 8 is best on ImageNet 256.

    Args:
        moments: of tokens in the color space that the lift is for.
        rank: of a subspace for training from scratch, 1 to D, or ``auto``: see :mod:`liftkit.fit.rank`.
        latent_patch: side of the latent patch of one token; a lift of free rank has none (1).
        space: ``latent`` takes the latents of the moments for what is to be modeled: a lift of free rank, ``latent_patch`` the side
            of its tokens.
        color: that color space; the paper's Oklab if left out.
        scale: rule of the scale, for a conversion.

    Returns:
        The lift, basis (D, rank) in float64.

    Raises:
        ValueError: if the rank is out of range, there are fewer tokens than it, or no energy.
    """
    if space == "latent":
        moments = moments.of_latents()
    if rank == "auto":
        rank = max(auto_rank(moments.pixel_gram, moments.count).rank, 1)
    if rank is not None and not 1 <= rank <= moments.pixel_dim:
        raise ValueError(f"pca: rank {rank} is out of range; {space} tokens have {moments.pixel_dim} numbers")
    check_moments(moments, rank or moments.latent_dim)
    principal = top_eigenvectors(moments.pixel_gram, rank or moments.latent_dim)
    if rank is None:
        basis = principal @ polar(principal.T @ moments.cross.T)
        return scaled_lift(basis, moments, kind="pca", latent_patch=latent_patch, color=color, rule=scale)
    # The sign of an eigenvector is arbitrary: its largest number is made positive.
    flip = torch.sign(principal.gather(0, principal.abs().argmax(dim=0, keepdim=True)))
    return free_lift(principal * flip, moments, "pca", color, latent_patch if space == "latent" else None)


def free_lift(
    basis: Tensor, moments: TokenMoments, kind: str, color: ColorSpace | None = None, latent_side: int | None = None
) -> Lift:
    """A subspace for training from scratch, s = 1; its ``figures`` say how it came about.

    Args:
        basis: (D, r), orthonormal columns.
        moments: of the tokens in question, in their place for pixels.
        kind: how the basis was found.
        color: of pixels.
        latent_side: side of a token's patch in latents; None for pixels.
    """
    captured = (basis * (moments.pixel_gram @ basis)).sum() / moments.pixel_gram.trace()
    figures = {
        "kind": kind,
        "images": moments.images,
        "tokens": moments.count,
        "scale_rule": "norm",
        "scale_norm": 1.0,
        "scale_least_squares": 1.0,
        "energy_captured": captured.item(),
    }
    if latent_side is not None:
        return Lift(basis, 1.0, latent_side, 1, figures=figures, space="latent")
    return Lift(basis, 1.0, isqrt(moments.pixel_dim // 3), 1, color or Oklab(), figures)
