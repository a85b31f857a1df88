"""FLUX.3: pictures to edit have a projection, blocks and position ids of their own. Diffusers has modular pipelines only.

The step-distilled models are flow maps: their output is a mean velocity over a step in latent time, of which the velocity in
pixel space does not follow. They are refused. Texts are not encoded here: the network reads the padding of a window whose length
follows from the text, and no pipeline's ``encode_prompt`` makes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from liftkit.models.conditioning import random
from liftkit.models.flux_like import two_by_two
from liftkit.models.layout import Layout
from liftkit.models.spec import Architecture, Config, Grid, Projection

ROPE = 0.5
"""What the models were trained with: places of image tokens are rows and columns times this."""


def _arguments(grid: Grid, given: Mapping[str, Any]) -> dict[str, Any]:
    """Ids (t, h, w, l): image tokens by row and column, text tokens by their place in the sequence."""
    image = torch.cartesian_prod(*(torch.arange(n) for n in (1, grid.rows, grid.columns, 1))).float()
    image[:, 1:3] *= ROPE
    text = torch.zeros(given["encoder_hidden_states"].shape[1], 4)
    text[:, 3] = torch.arange(len(text))
    return {"img_ids": image.to(grid.device), "txt_ids": text.to(grid.device), **given}


def _refuse(config: Config) -> str | None:
    if config.get("flow_map"):
        return "a step-distilled FLUX.3 (flow_map) predicts a mean velocity over a step, which cannot be lifted; use the base model"
    return None


FLUX3 = Architecture(
    name="Flux3Transformer2DModel",
    inputs=(Projection("x_embedders.image", "cpq"), Projection("x_embedders.image_cond", "cpq")),
    outputs=(Projection("proj_out", "cpq"),),
    layout=Layout.TOKENS,
    latent_patch=two_by_two,
    channel_keys=("in_channels", "cond_in_channels"),
    conditioning=random(encoder_hidden_states=(7, "joint_attention_dim")),
    arguments=_arguments,
    clean_inputs=("image_cond_hidden_states",),
    refuse=_refuse,
    reference=("norm_out",),
    adapters=(
        "mode_blocks.image.*.ff.linear_in",
        "mode_blocks.image.*.ff.linear_out",
        "txt_mode_blocks.*.ff.linear_in",
        "txt_mode_blocks.*.ff.linear_out",
        "single_transformer_blocks.*.ff.linear_in",
        "single_transformer_blocks.*.ff.linear_out",
        "single_transformer_blocks.*.attn.to_out.0",
    ),
)
