"""Ideogram 4: text and image in one sequence, text first; a second transformer, which sees no text, for guidance.

Both transformers get the same lift. Patches are flattened channels last, before the statistics of FLUX.2's VAE are applied, so
that an A of FLUX.2 means something else here. Rows of the state at the text's places are zero. Places of image tokens begin at
65536, which bfloat16 cannot count: ids stay whole numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from liftkit.errors import UsageError
from liftkit.models.conditioning import random
from liftkit.models.flux_like import image_ids, to_length, two_by_two
from liftkit.models.layout import Layout
from liftkit.models.spec import Architecture, Clock, Grid, Projection, grid_of_ids
from liftkit.models.vaes import BatchNorm

PADDING, IMAGE, TEXT, FIRST_PLACE = -1, 2, 3, 65536
"""Roles of tokens, and where image tokens begin, as the network was trained with."""


def _arguments(grid: Grid, given: Mapping[str, Any]) -> dict[str, Any]:
    """Texts are padded in front; padding is a segment of its own, which nothing attends to."""
    text, mask = given["encoder_hidden_states"], given["text_mask"].bool()
    count = grid.rows * grid.columns
    image = image_ids(grid, FIRST_PLACE, FIRST_PLACE)[None]
    places = (mask.long().cumsum(1) - 1).clamp(min=0).unsqueeze(-1).expand(-1, -1, 3)
    ones = mask.new_ones(grid.batch, count, dtype=torch.long)
    return {
        "encoder_hidden_states": to_length(text, text.shape[1] + count),
        "position_ids": torch.cat([places, image.expand(grid.batch, -1, -1)], dim=1),
        "segment_ids": torch.cat([torch.where(mask, 1, PADDING), ones], dim=1),
        "indicator": torch.cat([mask * TEXT, ones * IMAGE], dim=1),
    }


def _sequence(tokens: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    before = arguments["indicator"].shape[1] - tokens.shape[1]
    return torch.cat([tokens.new_zeros(len(tokens), before, tokens.shape[2]), tokens], dim=1)


def _token_grid(arguments: Mapping[str, Any]) -> tuple[int, int, int]:
    return grid_of_ids(arguments["position_ids"][0][arguments["indicator"][0] == IMAGE])


def _prompts(pipeline: Any, texts: list[str], length: int | None) -> dict[str, Tensor]:
    length = length or 512
    try:
        embeds, _, _, indicator = pipeline.encode_prompt(texts, 1, 1, length, pipeline._execution_device)
    except ValueError as error:  # it cuts nothing
        raise UsageError(f"a caption is too long for a text length of {length}: {error}") from error
    return {"encoder_hidden_states": embeds[:, :length], "text_mask": indicator[:, :length] == TEXT}


IDEOGRAM4 = Architecture(
    name="Ideogram4Transformer2DModel",
    inputs=(Projection("input_proj", "pqc"),),
    outputs=(Projection("final_layer.linear", "pqc"),),
    layout=Layout.TOKENS,
    latent_patch=two_by_two,
    clock=Clock.ONE_MINUS_SIGMA,
    sign=-1,
    channel_keys=("in_channels",),
    conditioning=random(encoder_hidden_states=(7, "llm_features_dim"), text_mask=(7,)),
    arguments=_arguments,
    sequence=_sequence,
    token_grid=_token_grid,
    latent_statistics=BatchNorm(order="pqc"),
    companions=("unconditional_transformer",),
    call={"guidance_schedule": None},
    reference=("final_layer.adaln_modulation",),
    adapters=(
        "layers.*.feed_forward.w1",
        "layers.*.feed_forward.w2",
        "layers.*.feed_forward.w3",
        "layers.*.attention.to_out.0",
    ),
    prompts=_prompts,
)
