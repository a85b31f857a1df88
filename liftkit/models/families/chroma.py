"""Chroma: FLUX.1's blocks without pooled text and guidance embedding; what modulates them comes from one small network.

Its pipeline masks text (all padding but the first token) by *numbers*: attention adds 1 where the mask is on. A mask of truth
values would be another network, so that the mask stays in the dtype of the text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from liftkit.models.conditioning import encoded, random
from liftkit.models.flux_like import ADAPTERS, BFL, INPUTS, OUTPUTS, two_by_two, with_ids
from liftkit.models.layout import Layout
from liftkit.models.spec import Architecture, Grid


def _arguments(grid: Grid, given: Mapping[str, Any]) -> dict[str, Any]:
    mask = given["attention_mask"].to(given["encoder_hidden_states"].dtype)
    image = mask.new_ones(grid.batch, grid.rows * grid.columns)
    return {**with_ids()(grid, given), "attention_mask": torch.cat([mask, image], dim=1)}


CHROMA = Architecture(
    name="ChromaTransformer2DModel",
    inputs=INPUTS,
    outputs=OUTPUTS,
    layout=Layout.TOKENS,
    latent_patch=two_by_two,
    conditioning=random(encoder_hidden_states=(7, "joint_attention_dim"), attention_mask=(7,)),
    arguments=_arguments,
    adapters=ADAPTERS,
    original={
        **BFL,
        "distilled_guidance_layer.layers.*.in_layer": ("distilled_guidance_layer.layers.*.linear_1",),
        "distilled_guidance_layer.layers.*.out_layer": ("distilled_guidance_layer.layers.*.linear_2",),
    },
    prompts=encoded("encoder_hidden_states", None, "attention_mask", do_classifier_free_guidance=False),
)
