"""Krea 2: one table of position ids for text and image; several hidden states of the text encoder for each text token.

Its guidance scale counts from the conditional prediction: 0 is none, and 4.5 is what others call 5.5.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from liftkit.models.conditioning import encoded, random
from liftkit.models.flux_like import image_ids, text_ids, two_by_two
from liftkit.models.layout import Layout
from liftkit.models.spec import Architecture, Grid, Projection, grid_of_ids


def _arguments(grid: Grid, given: Mapping[str, Any]) -> dict[str, Any]:
    text = text_ids(grid, given["encoder_hidden_states"].shape[1])
    return {"position_ids": torch.cat([text, image_ids(grid)]), **given}


def _token_grid(arguments: Mapping[str, Any]) -> tuple[int, int, int]:
    return grid_of_ids(arguments["position_ids"][-arguments["hidden_states"].shape[1] :])


KREA2 = Architecture(
    name="Krea2Transformer2DModel",
    inputs=(Projection("img_in", "cpq"),),
    outputs=(Projection("final_layer.linear", "cpq"),),
    layout=Layout.TOKENS,
    latent_patch=two_by_two,
    channel_keys=("in_channels",),
    conditioning=random(encoder_hidden_states=(7, "num_text_layers", "text_hidden_dim"), encoder_attention_mask=(7,)),
    arguments=_arguments,
    token_grid=_token_grid,
    guidance_from="conditional",
    adapters=(
        "transformer_blocks.*.ff.gate",
        "transformer_blocks.*.ff.up",
        "transformer_blocks.*.ff.down",
        "transformer_blocks.*.attn.to_out.0",
    ),
    prompts=encoded("encoder_hidden_states", "encoder_attention_mask"),
)
