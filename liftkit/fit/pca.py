"""The PCA fit (Eq. 8): the subspace that holds most pixel energy, as it is or turned onto the latents."""

from __future__ import annotations

import torch

from liftkit.color import ColorSpace
from liftkit.fit.alignment import top_eigenvectors
from liftkit.fit.moments import TokenMoments
from liftkit.fit.procrustes import polar
from liftkit.fit.rank import auto_rank
from liftkit.fit.scale import check_moments, scaled_lift
from liftkit.lift import Lift
from liftkit.options import Auto, ScaleRule


def fit_pca(
    moments: TokenMoments,
    *,
    rank: int | Auto | None = None,
    latent_patch: int = 2,
    color: ColorSpace | None = None,
    scale: ScaleRule = "norm",
) -> Lift:
    """The top eigenvectors Q of ``G_x = sum x x^T``, uncentered.

    For a conversion (``rank`` left out) they are rotated onto the latents inside their subspace,
    ``A = Q polar(Q^T C^T)``, at the latents' own rank. For training from scratch (``rank`` given) they are used as
    they are, largest first, with s = 1; 8 is best on ImageNet 256.

    Args:
        moments: of tokens in the color space that the lift is for.
        rank: of a subspace for training from scratch, 1 to D, or ``auto``: see :mod:`liftkit.fit.rank`.
        latent_patch: side of the latent patch of one token; a lift of free rank has none (1).
        color: that color space; the paper's Oklab if left out.
        scale: rule of the scale, for a conversion.

    Returns:
        The lift, basis (D, rank) in float64.

    Raises:
        ValueError: if the rank is out of range, there are fewer tokens than it, or no energy.
    """
    if rank == "auto":
        rank = max(auto_rank(moments.pixel_gram, moments.count).rank, 1)
    if rank is not None and not 1 <= rank <= moments.pixel_dim:
        raise ValueError(f"pca: rank {rank} is out of range; pixel tokens have {moments.pixel_dim} numbers")
    check_moments(moments, rank or moments.latent_dim)
    principal = top_eigenvectors(moments.pixel_gram, rank or moments.latent_dim)
    if rank is None:
        basis = principal @ polar(principal.T @ moments.cross.T)
        return scaled_lift(basis, moments, kind="pca", latent_patch=latent_patch, color=color, rule=scale)
    # The sign of an eigenvector is arbitrary: its largest number is made positive.
    flip = torch.sign(principal.gather(0, principal.abs().argmax(dim=0, keepdim=True)))
    return _free(principal * flip, moments, color)


def _free(basis: torch.Tensor, moments: TokenMoments, color: ColorSpace | None) -> Lift:
    lift = scaled_lift(basis, _self_paired(basis, moments), kind="pca", latent_patch=1, color=color, rule="norm")
    return Lift(
        basis, 1.0, lift.patch_size, 1, lift.color, {**lift.figures, "scale_norm": 1.0, "scale_least_squares": 1.0}
    )


def _self_paired(basis: torch.Tensor, moments: TokenMoments) -> TokenMoments:
    """Moments of (A^T x, x): a free subspace is its own latent space."""
    paired = TokenMoments(basis.shape[1], moments.pixel_dim)
    paired.count, paired.images = moments.count, moments.images
    paired.pixel_sum, paired.pixel_gram = moments.pixel_sum, moments.pixel_gram
    paired.latent_sum = basis.T @ moments.pixel_sum
    paired.cross = basis.T @ moments.pixel_gram
    paired.latent_gram = paired.cross @ basis
    return paired
