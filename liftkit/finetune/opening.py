"""Opening the complement: showing the network, from the first step on, what lies outside of the subspace.

A conversion gives the network A^T x alone, and its output has no part outside of A. Seen from there, learning about the rest is a
saddle: the output rows have nothing to read, and the input columns nobody to write for, so that neither has a gradient worth
following. Random input columns end that. They map the complement of A into directions of the hidden space that the lifted
projection leaves free, as far as there are any, so that they disturb the pretrained network as little as they can.
"""

from __future__ import annotations

import torch
from torch import Tensor


def opening_columns(weight: Tensor, basis: Tensor, strength: float, seed: int) -> Tensor:
    """What is added to an input projection of the student; the reference keeps the original.

    Args:
        weight: W_in A^T, (hidden, D) float64.
        basis: A, (D, r).
        strength: norm of the new columns, relative to the mean of the lifted ones.
        seed: of the directions.

    Returns:
        (hidden, D), zero on the span of A.
    """
    generator = torch.Generator().manual_seed(seed)
    hidden, dim, rank = len(weight), *basis.shape
    latent = weight @ basis
    outside = _complete(basis, dim - rank, generator)
    free = _complete(torch.linalg.qr(latent)[0] if rank < hidden else latent[:, :0], dim - rank, generator)
    size = latent.norm() / rank**0.5
    return strength * size * free @ outside.T


def _complete(known: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Random unit columns, orthogonal to known ones, and to each other as far as there is room: (n, count)."""
    random = torch.randn(len(known), count, dtype=torch.float64, generator=generator)
    random = random - known @ (known.T @ random)
    room = min(count, len(known) - known.shape[1])
    basis = torch.linalg.qr(random[:, :room])[0]
    rest = random[:, room:]
    return torch.cat([basis, rest / rest.norm(dim=0, keepdim=True).clamp(min=1e-12)], dim=1)
