"""Qwen-Image 2.1: one sequence of text and images. Tokens are single elements of a 16-fold VAE with opacity; the output covers the
text too, and references stand before the noise, the opposite of Qwen-Image-Edit. Text and references are modulated as at time 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from liftkit.models.conditioning import padded, random, trimmed
from liftkit.models.layout import Layout
from liftkit.models.spec import Architecture, Grid, Projection

LENGTH = 512
"""Tokens of a prompt where the model's folder names no other number; the pipeline itself knows no limit."""


def _arguments(grid: Grid, given: Mapping[str, Any]) -> dict[str, Any]:
    """A slot of the text encoder's sequence stands for 2 x 2 tokens; the image's slots come last.

    Padding would move the image in its rotations, so that no more of it is left than the longest prompt needs.
    """
    text, mask = trimmed(given["encoder_hidden_states"], given["encoder_hidden_states_mask"])
    slots = torch.arange(mask.shape[1] + grid.rows * grid.columns // 4, device=grid.device) >= mask.shape[1]
    return {
        **given,
        "encoder_hidden_states": text,
        "encoder_hidden_states_mask": mask,
        "img_shapes": [[(1, grid.rows, grid.columns)]] * grid.batch,
        "img_mask": slots.expand(grid.batch, -1),
    }


def _references(arguments: Mapping[str, Any]) -> Tensor | None:
    """All tokens but those of the last shape."""
    shapes, state = arguments["img_shapes"][0], arguments["hidden_states"]
    count = sum(prod(shape) for shape in shapes[:-1])
    return torch.arange(state.shape[1], device=state.device) < count if count else None


def _token_grid(arguments: Mapping[str, Any]) -> tuple[int, int, int]:
    return arguments["img_shapes"][0][-1]  # type: ignore[no-any-return]


def _prompts(pipeline: Any, prompts: list[str], length: int | None) -> dict[str, Tensor]:
    embeds, mask, _ = pipeline.encode_prompt(prompts, device=pipeline._execution_device)
    rows = list(embeds) if mask is None else [row[on] for row, on in zip(embeds, mask.bool())]
    text, mask = padded(rows, length or LENGTH)
    return {"encoder_hidden_states": text, "encoder_hidden_states_mask": mask}


QWEN_IMAGE_21 = Architecture(
    name="QwenImage21Transformer2DModel",
    inputs=(Projection("img_in", "cpq"),),
    outputs=(Projection("proj_out", "cpq"),),
    layout=Layout.TOKENS,
    conditioning=random(encoder_hidden_states=(7, "context_in_dim"), encoder_hidden_states_mask=(7,)),
    arguments=_arguments,
    clean_tokens=_references,
    token_grid=_token_grid,
    reference=("norm_out",),
    adapters=(
        "transformer_blocks.*.img_mlp.proj",
        "transformer_blocks.*.img_mlp.out",
        "transformer_blocks.*.attn.to_out.0",
    ),
    guidance_argument="true_cfg_scale",
    encoders=("text_encoder", "processor"),
    prompts=_prompts,
)
