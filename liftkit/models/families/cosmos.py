"""Cosmos, as Anima has it: the network appends a padding mask to the channels of its state by itself, so that the weight of its
first projection has columns that stay as they are. diffusers runs Anima by modular pipelines alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from liftkit.errors import UsageError
from liftkit.models.conditioning import random
from liftkit.models.layout import Layout
from liftkit.models.spec import LIFTED, Architecture, Blocks, Grid, Projection


def _with_mask(channels: int, lifted: int) -> Blocks:
    return (LIFTED,) if channels == lifted else (LIFTED, 1)


def _arguments(grid: Grid, given: Mapping[str, Any]) -> dict[str, Any]:
    """No padding. The network resizes the mask to its state, so that the size of the token grid will do.

    Raises:
        UsageError: if torchvision is not installed, which resizes it.
    """
    if not grid.config["concat_padding_mask"]:
        return dict(given)
    from diffusers.models.transformers import transformer_cosmos

    if not hasattr(transformer_cosmos, "transforms"):
        raise UsageError("CosmosTransformer3DModel resizes its padding mask by torchvision: pip install torchvision")
    return {"padding_mask": torch.zeros(1, 1, grid.rows, grid.columns, device=grid.device), **given}


COSMOS = Architecture(
    name="CosmosTransformer3DModel",
    inputs=(Projection("patch_embed.proj", "cpq", _with_mask),),
    outputs=(Projection("proj_out", "pqc"),),
    layout=Layout.VIDEO,
    conditioning=random(encoder_hidden_states=(7, "text_embed_dim")),
    arguments=_arguments,
    reference=("norm_out",),
    adapters=(
        "transformer_blocks.*.ff.net.0.proj",
        "transformer_blocks.*.ff.net.2",
        "transformer_blocks.*.attn1.to_out.0",
    ),
)
