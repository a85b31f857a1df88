"""Lumina-Next: a learned variance beside the velocity, and an output projection inside of the last norm.

The output has twice the channels; pipelines drop the second half, which is lifted like the first and means nothing. Their
guidance acts on the first *three* channels alone, a rule about latents that has no counterpart in pixels: Theorem 1 holds
through the stock pipeline without guidance. Time runs from 0 to 1, unscaled; the output is x_0 - eps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from liftkit.models.conditioning import random
from liftkit.models.layout import Layout
from liftkit.models.spec import LIFTED, Architecture, Blocks, Clock, Grid, Projection


def _with_variance(channels: int, lifted: int) -> Blocks:
    return (LIFTED,) * (channels // lifted)


def _rotation(grid: Grid, given: Mapping[str, Any]) -> dict[str, Any]:
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    head = grid.config["hidden_size"] // grid.config["num_attention_heads"]
    rotation = get_2d_rotary_pos_embed_lumina(head, grid.rows, grid.columns)
    return {"image_rotary_emb": rotation.to(grid.device), "cross_attention_kwargs": {}, **given}


def _prompts(pipeline: Any, prompts: list[str], length: int | None) -> dict[str, Tensor]:
    # The text of a batch is padded to its longest: more padding, which the mask leaves out, makes all as long as allowed.
    embeds, mask, *_ = pipeline.encode_prompt(
        prompts, do_classifier_free_guidance=False, device=pipeline._execution_device
    )
    length = -(-pipeline.max_sequence_length // 8) * 8
    return {
        "encoder_hidden_states": F.pad(embeds, (0, 0, 0, length - embeds.shape[1])),
        "encoder_mask": F.pad(mask, (0, length - mask.shape[1])),
    }


LUMINA_NEXT = Architecture(
    name="LuminaNextDiT2DModel",
    inputs=(Projection("patch_embedder.proj", "cpq"),),
    outputs=(Projection("norm_out.linear_2", "pqc", _with_variance),),
    layout=Layout.IMAGE,
    clock=Clock.ONE_MINUS_SIGMA,
    sign=-1,
    channel_keys=("in_channels",),
    conditioning=random(encoder_hidden_states=(8, "cross_attention_dim"), encoder_mask=(8,)),
    arguments=_rotation,
    reference=("norm_out.linear_1",),
    adapters=("layers.*.feed_forward.linear_1", "layers.*.feed_forward.linear_2", "layers.*.feed_forward.linear_3"),
    guidance="batch conditional first",
    prompts=_prompts,
)
