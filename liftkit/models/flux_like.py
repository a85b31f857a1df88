"""What FLUX.1 shares with the transformers that are built like it: projections, position ids, layers for LoRA."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from liftkit.models.spec import Config, Grid, Projection

INPUTS = (Projection("x_embedder", "cpq"),)
OUTPUTS = (Projection("proj_out", "cpq"),)
ADAPTERS = (
    "transformer_blocks.*.ff.net.0.proj",
    "transformer_blocks.*.ff.net.2",
    "transformer_blocks.*.ff_context.net.0.proj",
    "transformer_blocks.*.ff_context.net.2",
    "transformer_blocks.*.attn.to_out.0",
    # Of a whole name: as a suffix it would also mean the output projection.
    "single_transformer_blocks.*.proj_out",
)


def two_by_two(config: Config) -> int:
    """The pipeline folds 2 x 2 latents into a token; the transformer's own patch_size is 1."""
    return 2


def image_ids(grid: Grid, plane: int = 0, origin: int = 0) -> Tensor:
    """Places (plane, row, column) of image tokens, (N, 3), counted from ``origin``.

    Whole numbers, which no cast to a lower precision rounds; the transformers turn them into float32 themselves.
    """
    rows, columns = (torch.arange(n, device=grid.device) + origin for n in (grid.rows, grid.columns))
    return torch.cartesian_prod(torch.full((1,), plane, device=grid.device), rows, columns)


def text_ids(grid: Grid, length: int, *, counted: bool = False) -> Tensor:
    """Places of text tokens, (L, 3): all at 0, or (0, i, i) if they are ``counted``."""
    places = torch.arange(length, device=grid.device) * int(counted)
    return torch.stack([torch.zeros_like(places), places, places], dim=1)


def with_ids(**image: Any) -> Callable[[Grid, Mapping[str, Any]], dict[str, Any]]:
    """``arguments`` of a transformer that takes ``img_ids`` and ``txt_ids``.

    Args:
        image: of :func:`image_ids`; with ``counted`` for the text.
    """
    counted = image.pop("counted", False)

    def arguments(grid: Grid, given: Mapping[str, Any]) -> dict[str, Any]:
        text = text_ids(grid, given["encoder_hidden_states"].shape[1], counted=counted)
        return {"img_ids": image_ids(grid, **image), "txt_ids": text, **given}

    return arguments


def to_length(text: Tensor, length: int, axis: int = 1) -> Tensor:
    """Text (B, ..., L, ...) cut, or extended by zeros, to ``length`` along one axis."""
    found = text.shape[axis]
    if found >= length:
        return text.narrow(axis, 0, length)
    behind = [0, 0] * (text.ndim - 1 - axis)
    return F.pad(text, (*behind, 0, length - found))


BFL = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    "double_blocks.*.img_attn.qkv": tuple(f"transformer_blocks.*.attn.to_{part}" for part in "qkv"),
    "double_blocks.*.txt_attn.qkv": tuple(f"transformer_blocks.*.attn.add_{part}_proj" for part in "qkv"),
    "double_blocks.*.img_attn.proj": ("transformer_blocks.*.attn.to_out.0",),
    "double_blocks.*.txt_attn.proj": ("transformer_blocks.*.attn.to_add_out",),
    "double_blocks.*.img_mlp.0": ("transformer_blocks.*.ff.net.0.proj",),
    "double_blocks.*.img_mlp.2": ("transformer_blocks.*.ff.net.2",),
    "double_blocks.*.txt_mlp.0": ("transformer_blocks.*.ff_context.net.0.proj",),
    "double_blocks.*.txt_mlp.2": ("transformer_blocks.*.ff_context.net.2",),
    "double_blocks.*.img_mod.lin": ("transformer_blocks.*.norm1.linear",),
    "double_blocks.*.txt_mod.lin": ("transformer_blocks.*.norm1_context.linear",),
    "single_blocks.*.linear1": (
        *(f"single_transformer_blocks.*.attn.to_{part}" for part in "qkv"),
        "single_transformer_blocks.*.proj_mlp",
    ),
    "single_blocks.*.linear2": ("single_transformer_blocks.*.proj_out",),
    # XLabs' processors.
    "single_blocks.*.qkv": tuple(f"single_transformer_blocks.*.attn.to_{part}" for part in "qkv"),
    "single_blocks.*.proj": ("single_transformer_blocks.*.proj_out",),
    "single_blocks.*.modulation.lin": ("single_transformer_blocks.*.norm.linear",),
}
"""Names in the code of FLUX.1's authors, with their modules in diffusers; those that a model like it lacks mean nothing."""


def behind(ids: Callable[[Tensor, int], Tensor]) -> Callable[[Tensor, list[Tensor], dict[str, Any]], Tensor]:
    """``beside`` of networks that tell references, tokens behind the state's, by their position ids.

    Args:
        ids: of a reference, ``(img_ids of the state, its number from 1) -> ids``.
    """

    def place(state: Tensor, references: list[Tensor], arguments: dict[str, Any]) -> Tensor:
        own = arguments["img_ids"]
        arguments["img_ids"] = torch.cat([own, *(ids(own, number + 1) for number in range(len(references)))], -2)
        return torch.cat([state, *references], 1)

    return place
