"""Nucleus-Image: a mixture of experts that predicts x_0 - eps on sigma's clock; guided tokens get the length of conditional ones.

Its pipeline always rescales so; without guidance (a scale of 1) nothing is rescaled. A text's tokens are placed behind the
padding that its processor puts before them, so that texts are encoded one by one and extended at their end.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from liftkit.models.conditioning import random
from liftkit.models.flux_like import to_length
from liftkit.models.layout import Layout
from liftkit.models.spec import Architecture, Grid, Projection


def _arguments(grid: Grid, given: Mapping[str, Any]) -> dict[str, Any]:
    return {"img_shapes": [(1, grid.rows, grid.columns)] * grid.batch, **given}


def _token_grid(arguments: Mapping[str, Any]) -> tuple[int, int, int]:
    return arguments["img_shapes"][0]  # type: ignore[no-any-return]


def _prompts(pipeline: Any, texts: list[str], length: int | None) -> dict[str, Tensor]:
    length = length or 512
    embeds, masks = [], []
    for text in texts:
        found, mask = pipeline.encode_prompt([text], device=pipeline._execution_device, max_sequence_length=length)
        mask = torch.ones(found.shape[:2], dtype=torch.bool, device=found.device) if mask is None else mask.bool()
        embeds.append(to_length(found, length))
        masks.append(to_length(mask, length))
    return {"encoder_hidden_states": torch.cat(embeds), "encoder_hidden_states_mask": torch.cat(masks)}


def _rescale(guided: Tensor, conditional: Tensor, call: Mapping[str, Any]) -> Tensor:
    return guided * (conditional.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))


NUCLEUS = Architecture(
    name="NucleusMoEImageTransformer2DModel",
    inputs=(Projection("img_in", "cpq"),),
    outputs=(Projection("proj_out", "cpq"),),
    layout=Layout.TOKENS,
    sign=-1,
    conditioning=random(encoder_hidden_states=(7, "joint_attention_dim"), encoder_hidden_states_mask=(7,)),
    arguments=_arguments,
    token_grid=_token_grid,
    rescale=_rescale,
    reference=("norm_out",),
    adapters=(
        "transformer_blocks.*.attn.to_out.0",
        "transformer_blocks.*.img_mlp.net.0.proj",
        "transformer_blocks.*.img_mlp.net.2",
    ),
    encoders=("text_encoder", "processor"),
    prompts=_prompts,
)
