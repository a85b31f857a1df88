"""How well latents and pixels align: figures of a lift, each from second moments alone."""

from __future__ import annotations

from typing import Any

import torch

from liftkit.fit.moments import TokenMoments
from liftkit.lift import Lift


def alignment(lift: Lift, moments: TokenMoments) -> dict[str, Any]:
    """Figures of a lift on the tokens behind ``moments`` (of the lift's own colour space).

    Returns:
        A table with

        * ``energy_captured`` in [0, 1]: tr(A^T G_x A) / tr(G_x), pixel energy inside the subspace;
        * ``energy_best`` in [0, 1]: the same for the best subspace of that rank (PCA);
        * ``r2_pixels`` <= 1: pixel variance explained by the lift, 1 - E|x - s A z|^2 / Var x;
        * ``r2_pixels_linear`` <= 1: by an unconstrained linear map of z, the ceiling of any lift;
        * ``r2_latents`` <= 1: latent variance explained by A^T x / s;
        * ``lift_mse`` >= 0: E|x - s A z|^2 per number, in the normalised colour space;
        * ``scale``, ``scale_least_squares``: s as used, and the one that minimises E|x - s A z|^2;
        * ``spectrum``: eigenvalues of G_x per token, falling;
        * ``images``, ``tokens``: what they rest on.
    """
    basis = lift.basis.double()
    n, dim = moments.count, moments.pixel_dim
    pixel_energy, latent_energy = moments.pixel_gram.trace(), moments.latent_gram.trace()
    pixel_variance = pixel_energy - moments.pixel_sum.square().sum() / n
    latent_variance = latent_energy - moments.latent_sum.square().sum() / n
    aligned = (moments.cross * basis.T).sum()
    captured = (basis * (moments.pixel_gram @ basis)).sum()
    spectrum = torch.linalg.eigvalsh(moments.pixel_gram).flip(0).clamp(min=0)
    residual = pixel_energy - 2 * lift.scale * aligned + lift.scale**2 * latent_energy
    back = latent_energy - 2 / lift.scale * aligned + captured / lift.scale**2
    return {
        "images": moments.images,
        "tokens": n,
        "energy_captured": (captured / pixel_energy).item(),
        "energy_best": (spectrum[: lift.rank].sum() / spectrum.sum()).item(),
        "r2_pixels": (1 - residual / pixel_variance).item(),
        "r2_pixels_linear": (1 - linear_residual(moments) / pixel_variance).item(),
        "r2_latents": (1 - back / latent_variance).item(),
        "lift_mse": (residual / (n * dim)).item(),
        "scale": lift.scale,
        "scale_least_squares": (aligned / latent_energy).item(),
        "spectrum": (spectrum / n).tolist(),
    }


def linear_residual(moments: TokenMoments) -> torch.Tensor:
    """sum |x - W z - b|^2 of the best affine map, from centred moments; a tiny ridge keeps it solvable."""
    n = moments.count
    latent_gram = moments.latent_gram - torch.outer(moments.latent_sum, moments.latent_sum) / n
    cross = moments.cross - torch.outer(moments.latent_sum, moments.pixel_sum) / n
    energy = moments.pixel_gram.trace() - moments.pixel_sum.square().sum() / n
    ridge = 1e-9 * latent_gram.diagonal().mean().clamp(min=1e-30)
    solved = torch.linalg.solve(latent_gram + ridge * torch.eye(len(latent_gram), dtype=torch.float64), cross)
    return energy - (cross * solved).sum()
