"""Tokens: image patches as vectors, and the orders in which models lay their elements out.

The canonical order of a token is (channel, row, column), of tokens row-major. Models disagree: some flatten
a patch as (row, column, channel), and a pixel model seen through ``pixel_unshuffle`` holds its pixels folded.
Every such layout is a fixed permutation of the canonical one.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

TokenOrder = Literal["cpq", "pqc"]
"""How a projection flattens a patch: ``cpq`` = (channel, row, column), ``pqc`` = (row, column, channel)."""


def patchify(x: Tensor, patch: int, order: TokenOrder = "cpq") -> Tensor:
    """Cut images into tokens.

    Args:
        x: (B, C, H, W); H and W divisible by ``patch``.
        patch: side of a patch, in elements of x.
        order: of a token's elements.

    Returns:
        (B, N, C * patch * patch), tokens row-major.

    Raises:
        ValueError: if the patch does not divide the image.
    """
    batch, channels, height, width = x.shape
    if height % patch or width % patch:
        raise ValueError(f"patchify: a {height} x {width} image cannot be cut into patches of {patch} x {patch}")
    grid = x.reshape(batch, channels, height // patch, patch, width // patch, patch)
    axes = (0, 2, 4, 1, 3, 5) if order == "cpq" else (0, 2, 4, 3, 5, 1)
    return grid.permute(axes).reshape(batch, -1, channels * patch * patch)


def unpatchify(tokens: Tensor, patch: int, height: int, width: int, order: TokenOrder = "cpq") -> Tensor:
    """The inverse of :func:`patchify`.

    Args:
        tokens: (B, N, C * patch * patch).
        patch: side of a patch.
        height: of the image, divisible by ``patch``.
        width: of the image, divisible by ``patch``.
        order: of a token's elements.

    Returns:
        (B, C, height, width).

    Raises:
        ValueError: if the number of tokens is not that of the image.
    """
    batch, count, _ = tokens.shape
    rows, columns = height // patch, width // patch
    if rows * columns != count or height % patch or width % patch:
        raise ValueError(
            f"unpatchify: {count} tokens of {patch} x {patch} do not tile an image of {height} x {width}, "
            f"which needs {rows * columns}"
        )
    if order == "cpq":
        grid = tokens.reshape(batch, rows, columns, -1, patch, patch).permute(0, 3, 1, 4, 2, 5)
    else:
        grid = tokens.reshape(batch, rows, columns, patch, patch, -1).permute(0, 5, 1, 3, 2, 4)
    return grid.reshape(batch, -1, height, width)


def token_order(channels: int, patch: int, order: TokenOrder, fold: int = 1) -> Tensor:
    """The permutation from the canonical order to a model's own: ``native = canonical[..., permutation]``.

    Args:
        channels: of the image, before folding.
        patch: side of the model's patch, in elements of the (folded) image.
        order: how the model flattens a patch of C' channels.
        fold: f of ``pixel_unshuffle``: the model sees C' = channels * f * f channels on a grid f times coarser,
            and the canonical token is the patch of ``fold * patch`` pixels. 1 for latents.

    Returns:
        int64 (channels * (fold * patch)**2,).
    """
    side = fold * patch
    canonical = torch.arange(channels * side * side)
    # (channel, patch row, fold row, patch column, fold column): a pixel row is patch row * fold + fold row.
    grid = canonical.reshape(channels, patch, fold, patch, fold)
    axes = (0, 2, 4, 1, 3) if order == "cpq" else (1, 3, 0, 2, 4)
    return grid.permute(axes).reshape(-1)
