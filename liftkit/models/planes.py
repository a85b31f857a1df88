"""The noisy part of what a transformer's ``forward`` sees, as whole images, whatever its layout.

A state has them folded, packed into tokens, or among reference tokens and text. :func:`refined` and :func:`refined_tokens` change
a velocity there as images, and leave everything else as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import isqrt
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from liftkit.errors import LiftkitError
from liftkit.models.spec import Architecture, Config
from liftkit.tokens import patchify, unpatchify

Refine = Callable[[Tensor, Tensor, Tensor], Tensor]
"""States and velocities (B, 3, H, W) and sigma (B,) to other velocities."""


def refined(spec: Architecture, config: Config, refine: Refine, folded: tuple[Tensor, Tensor], sigma: Tensor) -> Tensor:
    """A velocity on the grid of ``forward``, changed as images.

    Args:
        spec: the architecture.
        config: of the pixel model.
        refine: changes it.
        folded: states and velocities, (B, C, h, w) each, without further channels.
        sigma: (B,).

    Returns:
        The velocity, (B, C, h, w).
    """
    patch = spec.latent_patch(config)
    cells, fold = patch // spec.cell(config), _fold(spec, config)
    state, velocity = (F.pixel_shuffle(F.pixel_shuffle(each, cells), fold) for each in folded)
    result = refine(state, velocity, sigma)
    return F.pixel_unshuffle(F.pixel_unshuffle(result, fold), cells)


def refined_tokens(
    spec: Architecture,
    config: Config,
    refine: Refine,
    tokens: tuple[Tensor, Tensor],
    sigma: Tensor,
    arguments: Mapping[str, Any],
) -> Tensor:
    """A velocity in packed tokens, changed as images where tokens are noisy.

    Args:
        spec, config, refine, sigma: see :func:`refined`.
        tokens: the last ones of the state and their velocities, (B, N, D) each.
        arguments: of the call; they tell the grid, and which of the state's tokens are references.

    Returns:
        The velocity, (B, N, D).

    Raises:
        LiftkitError: if the grid does not go with the tokens.
    """
    velocity = tokens[1]
    count, patch, fold = velocity.shape[1], spec.latent_patch(config), _fold(spec, config)
    pictures, rows, columns = spec.token_grid(arguments)
    wanted = pictures * rows * columns
    clean = spec.clean_tokens(arguments)
    if clean is None:
        places = slice(count - wanted, count)
    else:
        noisy = (~(clean[0] if clean.ndim == 2 else clean))[-count:]
        first = int(noisy.int().argmax())
        # Reference tokens come before the noisy ones, or behind them.
        places = slice(first, first + wanted)
        wanted = wanted if bool(noisy[places].all()) and int(noisy.sum()) == wanted else 0
    if not 0 < wanted <= count:
        raise LiftkitError(
            f"{spec.lifted_name}: a detail head cannot tell {rows} x {columns} tokens of an image among {count}"
        )
    size = rows * patch * fold, columns * patch * fold

    def images(each: Tensor) -> Tensor:
        grid = each[:, places].reshape(-1, rows * columns, each.shape[-1])
        return F.pixel_shuffle(unpatchify(grid, patch, size[0] // fold, size[1] // fold, spec.state_order), fold)

    result = refine(images(tokens[0]), images(tokens[1]), sigma.repeat_interleave(pictures))
    packed = patchify(F.pixel_unshuffle(result, fold), patch, spec.state_order)
    if wanted == count:
        return packed.reshape(velocity.shape)
    changed = velocity.clone()
    changed[:, places] = packed.reshape(len(velocity), wanted, -1)
    return changed


def _fold(spec: Architecture, config: Config) -> int:
    """Pixels along one latent."""
    return isqrt(config["lift_dim"] // 3) // spec.latent_patch(config)
