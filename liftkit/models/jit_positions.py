"""Where and when: what JiT knows of the time and of the places of tokens, all of it computed and nothing learned."""

from __future__ import annotations

from functools import lru_cache

import torch
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from torch import Tensor

FREQUENCIES = 256
"""Numbers of the sinusoid that tells the network its time."""
PERIOD, THETA = 10000.0, 10000.0


def sinusoid(time: Tensor) -> Tensor:
    """Cosines, then sines, of a time in [0, 1] that is not scaled up: (B,) to (B, 256), float32."""
    half = FREQUENCIES // 2
    rates = PERIOD ** (-torch.arange(half, dtype=torch.float32, device=time.device) / half)
    angles = time.float()[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


@lru_cache(maxsize=32)
def positions(rows: int, columns: int, width: int, device: torch.device) -> Tensor:
    """The fixed table of positions, (rows * columns, width) float32."""
    side = max(rows, columns)
    table = get_2d_sincos_pos_embed(width, side, base_size=side, output_type="pt")
    return table.float().reshape(side, side, width)[:rows, :columns].reshape(-1, width).to(device)


@lru_cache(maxsize=32)
def rotations(rows: int, columns: int, dim: int, still: int, device: torch.device) -> Tensor:
    """Rotations of pairs of a head's numbers: the first half of the pairs by the row, the second by the column.

    Args:
        rows, columns: of the token grid.
        dim: of a head.
        still: tokens in front that are not rotated.

    Returns:
        (still + rows * columns, dim / 2), complex64 of absolute value 1.
    """
    rates = THETA ** (-torch.arange(0, dim // 2, 2, dtype=torch.float32) / (dim // 2))
    place = torch.cartesian_prod(torch.arange(float(rows)), torch.arange(float(columns)))
    angles = torch.cat([torch.zeros(still, dim // 2), (place[:, :, None] * rates).flatten(1)])
    return torch.polar(torch.ones_like(angles), angles).to(device)


def rotated(x: Tensor, table: Tensor) -> Tensor:
    """Rotate neighboring numbers of (B, heads, N, dim) as pairs, in float32 at least; the result has the precision of ``x``."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * table).flatten(-2).to(x.dtype)
