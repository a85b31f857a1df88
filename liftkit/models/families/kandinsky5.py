"""Kandinsky 5 as text-to-image: channels last, other order out than in, positions from the caller, prompts without a mask. The
stock class computes in float32 whatever its weights are. Its image-to-image models see ``[noise, image, mask]`` in every cell.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from liftkit.models.conditioning import padded, random, trimmed
from liftkit.models.layout import Layout
from liftkit.models.spec import LIFTED, Architecture, Blocks, Clock, Config, Grid, Projection

LENGTH = 512
"""Tokens of a prompt where the model's folder names no other number."""


def _blocks(channels: int, lifted: int) -> Blocks:
    return (LIFTED,) if channels == lifted else (LIFTED, LIFTED, 1)


def _channels(config: Config) -> int:
    """With a clean picture beside the noisy one, and its mask, where the model continues pictures."""
    return int(config["in_visual_dim"] * 2 + 1 if config["visual_cond"] else config["in_visual_dim"])


def _arguments(grid: Grid, given: Mapping[str, Any]) -> dict[str, Any]:
    """Prompts are attended to in full, so that padding is left only as far as the longest one of a batch goes."""
    text, mask = trimmed(given["encoder_hidden_states"], given["text_mask"])
    sizes = (1, grid.rows, grid.columns)
    return {
        "encoder_hidden_states": text,
        "pooled_projections": given["pooled_projections"],
        "visual_rope_pos": [torch.arange(size, device=grid.device) for size in sizes],
        "text_rope_pos": torch.arange(mask.shape[1], device=grid.device),
    }


def _prompts(pipeline: Any, prompts: list[str], length: int | None) -> dict[str, Tensor]:
    length = length or LENGTH
    embeds, pooled, ends = pipeline.encode_prompt(
        prompts, device=pipeline._execution_device, max_sequence_length=length
    )
    text, mask = padded([row[:count] for row, count in zip(embeds, ends.diff())], length)
    return {"encoder_hidden_states": text, "text_mask": mask, "pooled_projections": pooled}


KANDINSKY5 = Architecture(
    name="Kandinsky5Transformer3DModel",
    inputs=(Projection("visual_embeddings.in_layer", "pqc", _blocks),),
    outputs=(Projection("out_layer.out_layer", "cpq"),),
    layout=Layout.CHANNELS_LAST,
    clock=Clock.THOUSAND_SIGMA,
    channel_keys=("in_visual_dim", "out_visual_dim"),
    state_channels=_channels,
    conditioning=random(encoder_hidden_states=(7, "in_text_dim"), text_mask=(7,), pooled_projections=("in_text_dim2",)),
    arguments=_arguments,
    reference=("out_layer.modulation",),
    adapters=(
        "visual_transformer_blocks.*.feed_forward.in_layer",
        "visual_transformer_blocks.*.feed_forward.out_layer",
    ),
    encoders=("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
    prompts=_prompts,
)
