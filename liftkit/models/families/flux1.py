"""FLUX.1: dev, schnell, Kontext, Fill, Control.

Tokens come packed. Kontext appends the tokens of a reference image. Fill and Control put further channels beside the noisy ones: a
clean image, and for Fill the mask in full resolution, which stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from liftkit.models.conditioning import encoded, random
from liftkit.models.flux_like import BFL, behind
from liftkit.models.layout import Layout
from liftkit.models.spec import LIFTED, Architecture, Blocks, Grid, Projection


def grid_ids(grid: Grid, given: Mapping[str, Any]) -> dict[str, Any]:
    """Position ids (t, row, column) of image tokens, and zeros for text."""
    image = torch.cartesian_prod(*(torch.arange(n, device=grid.device) for n in (1, grid.rows, grid.columns)))
    text = torch.zeros(given["encoder_hidden_states"].shape[1], 3, device=grid.device)
    return {"img_ids": image.float(), "txt_ids": text, **given}


def references(arguments: Mapping[str, Any]) -> Tensor | None:
    """Reference images sit at t = 1, the tokens being denoised at t = 0."""
    ids = arguments.get("img_ids")
    return None if ids is None else ids[..., 0] != 0


def _blocks(channels: int, lifted: int) -> Blocks:
    beside = channels - lifted
    if beside <= lifted:
        return (LIFTED,) if beside == 0 else (LIFTED, LIFTED)
    return (LIFTED, LIFTED, beside - lifted)


BLOCKS = (
    "transformer_blocks.*.ff.net.0.proj",
    "transformer_blocks.*.ff.net.2",
    "transformer_blocks.*.attn.to_out.0",
    "single_transformer_blocks.*.proj_out",
)
"""Where transformers like this one get their LoRA."""

FLUX1 = Architecture(
    name="FluxTransformer2DModel",
    inputs=(Projection("x_embedder", "cpq", _blocks),),
    outputs=(Projection("proj_out", "cpq"),),
    layout=Layout.TOKENS,
    conditioning=random(
        encoder_hidden_states=(7, "joint_attention_dim"), pooled_projections=("pooled_projection_dim",)
    ),
    latent_patch=lambda config: 2,
    # Fill and Control count what they denoise in the first alone.
    channel_keys=("out_channels", "in_channels"),
    arguments=grid_ids,
    clean_tokens=references,
    # Kontext's one reference has a 1 before its rows and columns; further ones would have the same.
    beside=behind(lambda ids, number: torch.cat([torch.ones_like(ids[..., :1]), ids[..., 1:]], -1)),
    references={"FluxKontextPipeline": range(2)},
    reference=("norm_out",),
    adapters=BLOCKS,
    guidance_argument="true_cfg_scale",
    original=BFL,
    encoders=("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
    prompts=encoded("encoder_hidden_states", "pooled_projections", prompt_2=None),
)
