"""How well latents and pixels align: the figures of a lift, from second moments alone.

Every figure is taken held out: the fit is repeated without each fold and looked at on that fold. A figure's value is
the mean over folds, its spread the standard deviation, and beside it stands what the fit says of its own images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import acos, degrees, sqrt
from typing import Any

import torch
from torch import Tensor

from liftkit.fit.folds import FoldedMoments
from liftkit.fit.moments import TokenMoments
from liftkit.lift import Lift, principal_angles

Fit = Callable[[TokenMoments], Lift]


def figures(lift: Lift, moments: TokenMoments, seen: TokenMoments | None = None) -> dict[str, float]:
    """Scalar figures of a lift on the tokens behind ``moments`` (of the lift's own color space).

    Args:
        lift: to look at.
        moments: of the tokens to look on.
        seen: of the tokens that the lift was fitted on; every other map is fitted on them too. ``moments`` if left out.

    Returns:
        A table with

        * ``energy_captured`` in [0, 1]: tr(A^T G_x A) / tr(G_x), pixel energy inside the subspace;
        * ``energy_best`` in [0, 1]: the same for the best subspace of that rank (PCA), the optimum on these tokens;
        * ``r2_pixels`` <= 1: pixel variance explained by the lift, 1 - E|x - s A z|^2 / Var x;
        * ``r2_pixels_lsq`` <= 1: the same with the least-squares scale;
        * ``r2_pixels_linear`` <= 1: by an unconstrained affine map of z, the ceiling of any lift;
        * ``r2_latents`` <= 1: latent variance explained by an affine map of A^T x, mean over the r numbers;
        * ``cosine`` in [-1, 1]: tr(A C) / sqrt(tr(A^T G_x A) tr(G_z)), the mean alignment of A^T x and z;
        * ``cosine_chance`` in [0, 1]: the root mean square of that cosine if A is turned at random inside its subspace;
        * ``pixel_detail`` in [0, 1]: share of pixel variance inside patches, about each patch's mean color;
        * ``latent_rms`` >= 0: root mean square of the latents, 1 where a pipeline normalizes its latents;
        * ``scale`` > 0: s, as used; ``scale_lsq``: the one that minimizes E|x - s A z|^2;
        * ``scale_gap`` in [0, 1]: 1 - scale_lsq / scale, which is 1 - cosine for the norm-matching scale.

        Variances are those of all tokens, seen or not, so that a fold of plain images does not divide by nothing.
    """
    seen = seen if seen is not None else moments
    terms, known = _Terms(lift, moments), _Terms(lift, seen)
    variance = pixel_variance(moments, seen).sum()
    scale_lsq = (known.aligned / known.latent_energy).item()
    return {
        "energy_captured": (terms.captured / terms.pixel_energy).item(),
        "energy_best": best_energy(moments, lift.rank),
        "r2_pixels": (1 - terms.residual(lift.scale) / variance).item(),
        "r2_pixels_lsq": (1 - terms.residual(scale_lsq) / variance).item(),
        "r2_pixels_linear": (1 - linear_map(seen).residual(moments).sum() / variance).item(),
        "r2_latents": latent_r2(lift, moments, seen).mean().item(),
        "cosine": (terms.aligned / (terms.captured * terms.latent_energy).sqrt()).item(),
        "cosine_chance": (terms.turned / (terms.captured * terms.latent_energy).sqrt()).item(),
        "pixel_detail": (_inside_patches(moments) / variance).clamp(min=0).item(),
        "latent_rms": (terms.latent_energy / (moments.count * moments.latent_dim)).sqrt().item(),
        "scale": lift.scale,
        "scale_lsq": scale_lsq,
        "scale_gap": 1 - scale_lsq / lift.scale,
    }


def pixel_variance(moments: TokenMoments, seen: TokenMoments) -> Tensor:
    """The variance that R^2 is measured against, (D,): of all tokens, times the number of those looked on."""
    total = moments if seen is moments else moments + seen
    variance = total.pixel_gram.diagonal() / total.count - (total.pixel_sum / total.count).square()
    return moments.count * variance.clamp(min=1e-12 * total.pixel_gram.trace().item() / total.count / total.pixel_dim)


def _inside_patches(moments: TokenMoments) -> Tensor:
    """sum |x - mean|^2 with the mean color of each patch."""
    side = moments.pixel_dim // 3
    colors = moments.pixel_gram.view(3, side, 3, side).diagonal(dim1=0, dim2=2)
    return moments.pixel_gram.trace() - colors.sum() / side


class _Terms:
    """The traces that the figures are made of."""

    def __init__(self, lift: Lift, moments: TokenMoments) -> None:
        basis = lift.basis.double()
        self.pixel_energy, self.latent_energy = moments.pixel_gram.trace(), moments.latent_gram.trace()
        projected = moments.cross @ basis
        self.aligned = projected.trace()
        # E tr(M R)^2 = |M|_F^2 / r over rotations R.
        self.turned = projected.norm() / basis.shape[1] ** 0.5
        self.captured = (basis * (moments.pixel_gram @ basis)).sum()

    def residual(self, scale: float) -> Tensor:
        """sum |x - s A z|^2."""
        return self.pixel_energy - 2 * scale * self.aligned + scale**2 * self.latent_energy


class AffineMap:
    """``x ~ z W + b``, the best there is: the ceiling of any lift.

    Attributes:
        weight: W, (r, D).
        bias: b, (D,).
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, latent_tokens: Tensor) -> Tensor:
        """Latent tokens (B, N, r) to pixel tokens (B, N, D)."""
        return latent_tokens @ self.weight.to(latent_tokens) + self.bias.to(latent_tokens)

    def residual(self, moments: TokenMoments) -> Tensor:
        """sum (x - z W - b)^2 over the tokens behind ``moments``, for each of the D numbers."""
        w, b, n = self.weight, self.bias, moments.count
        square = moments.pixel_gram.diagonal() + (w * (moments.latent_gram @ w)).sum(dim=0) + n * b.square()
        mixed = (moments.cross * w).sum(dim=0) + b * moments.pixel_sum - b * (moments.latent_sum @ w)
        return square - 2 * mixed


def linear_map(moments: TokenMoments) -> AffineMap:
    """The least-squares affine map of latent tokens onto pixel tokens; a tiny ridge keeps it solvable."""
    n = moments.count
    latent_mean, pixel_mean = moments.latent_sum / n, moments.pixel_sum / n
    gram = moments.latent_gram - n * torch.outer(latent_mean, latent_mean)
    cross = moments.cross - n * torch.outer(latent_mean, pixel_mean)
    weight = torch.linalg.solve(_ridged(gram), cross)
    return AffineMap(weight, pixel_mean - latent_mean @ weight)


def latent_r2(lift: Lift, moments: TokenMoments, seen: TokenMoments | None = None) -> Tensor:
    """R^2 <= 1 of each of the r latent numbers from A^T x, by the best affine map on ``seen``."""
    seen = seen if seen is not None else moments
    here, there = _projected(lift, moments), _projected(lift, seen)
    return 1 - linear_map(there).residual(here) / pixel_variance(here, here if seen is moments else there)


def _projected(lift: Lift, moments: TokenMoments) -> TokenMoments:
    """Moments of (A^T x, z): the latents in the place of pixels, and projected pixels in the place of latents."""
    basis = lift.basis.double()
    result = TokenMoments(lift.rank, moments.latent_dim)
    result.count, result.images = moments.count, moments.images
    result.latent_sum, result.pixel_sum = basis.T @ moments.pixel_sum, moments.latent_sum
    result.latent_gram, result.pixel_gram = basis.T @ moments.pixel_gram @ basis, moments.latent_gram
    result.cross = (moments.cross @ basis).T
    return result


def pixel_r2(lift: Lift, moments: TokenMoments, seen: TokenMoments | None = None) -> tuple[Tensor, Tensor]:
    """R^2 <= 1 of each color channel, (3,): by the lift, and by the unconstrained affine map on ``seen``."""
    seen = seen if seen is not None else moments
    basis, s = lift.basis.double(), lift.scale
    lifted = (basis * (basis @ moments.latent_gram)).sum(dim=1)
    residual = moments.pixel_gram.diagonal() - 2 * s * (moments.cross.T * basis).sum(dim=1) + s * s * lifted
    linear = linear_map(seen).residual(moments)
    by_channel = [value.view(3, -1).sum(dim=1) for value in (residual, linear, pixel_variance(moments, seen))]
    return 1 - by_channel[0] / by_channel[2], 1 - by_channel[1] / by_channel[2]


def best_energy(moments: TokenMoments, rank: int) -> float:
    """Share of pixel energy in the best subspace of a rank, in [0, 1]."""
    values = torch.linalg.eigvalsh(moments.pixel_gram).clamp(min=0)
    return (values[-rank:].sum() / values.sum()).item()


def spectrum(moments: TokenMoments) -> list[float]:
    """Eigenvalues of G_x per token, falling: D numbers >= 0, energy per direction of a pixel token."""
    return (torch.linalg.eigvalsh(moments.pixel_gram).flip(0).clamp(min=0) / moments.count).tolist()


def energy_angle(a: Tensor, b: Tensor, pixel_gram: Tensor) -> float:
    """The angle by which energy leaves one subspace for the other, in degrees, [0, 90].

    ``sin^2 = tr(P (G P)) / tr(P_a G)`` with P the part of P_a outside b: principal angles weighted by the energy that
    lies there. Directions without energy, which no data can determine, do not count.
    """
    a, b = a.double(), b.double()
    inside = (a.T @ pixel_gram @ a).trace()
    outside = a - b @ (b.T @ a)
    missed = (a.T @ pixel_gram @ a @ (outside.T @ outside)).trace()
    return degrees(acos(sqrt(max(0.0, min(1.0, 1.0 - (missed / inside).item())))))


def lift_angle(a: Tensor, b: Tensor, latent_gram: Tensor) -> float:
    """The mean angle between two lifts of the same latents, ``cos = E<A z, B z> / E|z|^2``, in degrees, [0, 180]."""
    cosine = ((a.double().T @ b.double()) * latent_gram).sum() / latent_gram.trace()
    return degrees(acos(max(-1.0, min(1.0, cosine.item()))))


def alignment_kept(folded: FoldedMoments, fit: Fit) -> list[float]:
    """How much of its alignment a half of the images keeps under the fit of the other: tr(A_a C_b) / tr(A_b C_b).

    It is 1 where both halves determine the same lift, and counts no direction in which latents and pixels have nothing
    in common, which no number of images determines.

    Args:
        folded: moments of at least two images.
        fit: makes a lift of moments.

    Returns:
        A share <= 1 (up to what a fit that is not the best of its half leaves) for each half of each halving.
    """
    result = []
    for halves in folded.halvings():
        bases = [fit(half).basis.double() for half in halves]
        for half, own, other in zip(halves, bases, reversed(bases)):
            kept, best = ((half.cross * basis.T).sum().item() for basis in (other, own))
            result.append(kept / best if best > 0 else 0.0)
    return result


def latent_spread(moments: TokenMoments, latent_patch: int) -> list[float]:
    """Standard deviation >= 0 of each latent channel, C numbers, about the channel's mean."""
    channels = (moments.latent_gram.diagonal(), moments.latent_sum)
    square, middle = ((value / moments.count).view(-1, latent_patch**2).mean(dim=1) for value in channels)
    return (square - middle.square()).clamp(min=0).sqrt().tolist()


def alignment(folded: FoldedMoments, fit: Fit) -> dict[str, Any]:
    """Everything that moments say about a fit: held out, with spread, per channel, and against PCA and itself.

    Args:
        folded: moments of tokens in the color space that the lifts are for.
        fit: makes a lift of moments.

    Returns:
        The ``figures``, ``channels``, ``spectrum`` and ``angles`` of the schema in docs/report.md.
    """
    total = folded.total
    lift = fit(total)
    if total.images < 2:
        raise ValueError("one image cannot be held out of its own fit; give more images")
    held_out = [(fit(rest), fold, rest) for rest, fold in folded.splits()]
    rows = [figures(*each) for each in held_out]
    fitted = figures(lift, total)
    first, second = (fit(half) for half in folded.halves())
    kept = alignment_kept(folded, fit)
    latents = [latent_r2(*each).view(-1, lift.latent_patch**2).mean(dim=1) for each in held_out]
    by_lift, by_map = zip(*(pixel_r2(*each) for each in held_out))
    pca = top_eigenvectors(total.pixel_gram, lift.rank)
    return {
        "images": total.images,
        "tokens": total.count,
        "folds": len(rows),
        "figures": {
            name: {
                "value": mean([row[name] for row in rows]),
                "spread": spread([row[name] for row in rows]),
                "fitted": fitted[name],
            }
            for name in fitted
        }
        | {"alignment_kept": {"value": mean(kept), "spread": spread(kept), "fitted": 1.0}},
        "channels": {
            **_channels({"latents": latents, "colors_lift": by_lift, "colors_linear": by_map}),
            "latents_std": latent_spread(total, lift.latent_patch),
        },
        "spectrum": spectrum(total),
        "angles": {
            "pca": principal_angles(lift.basis, pca),
            "pca_energy": energy_angle(lift.basis, pca, total.pixel_gram),
            "halves": principal_angles(first.basis, second.basis),
            "halves_energy": energy_angle(first.basis, second.basis, total.pixel_gram),
            "halves_lift": lift_angle(first.basis, second.basis, total.latent_gram),
        },
    }


def _channels(rows: dict[str, Sequence[Tensor]]) -> dict[str, Any]:
    """Values per channel, each a tensor per fold: their means over folds and, under ``spread``, standard deviations."""
    columns = {name: torch.stack(list(folds)).T.tolist() for name, folds in rows.items()}
    means: dict[str, Any] = {name: [mean(values) for values in channels] for name, channels in columns.items()}
    return means | {"spread": {name: [spread(values) for values in channels] for name, channels in columns.items()}}


def top_eigenvectors(gram: Tensor, rank: int) -> Tensor:
    """The eigenvectors of the largest eigenvalues, (D, rank), largest first."""
    return torch.linalg.eigh(gram.double())[1].flip(1)[:, :rank].contiguous()


def _ridged(gram: Tensor) -> Tensor:
    ridge = 1e-9 * gram.diagonal().mean().clamp(min=1e-30)
    return gram + ridge * torch.eye(len(gram), dtype=gram.dtype)


def mean(values: list[float]) -> float:
    """A figure's value: its mean over folds."""
    return sum(values) / len(values)


def spread(values: list[float]) -> float:
    """A figure's spread: its standard deviation over folds, 0 for one fold."""
    middle = mean(values)
    return sqrt(sum((value - middle) ** 2 for value in values) / max(len(values) - 1, 1))
