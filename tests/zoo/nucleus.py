"""Nucleus-Image, one of its blocks a mixture of experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests import vaes
from tests.zoo.specimen import Specimen, draw, masked


def read(prompt: list[str], **more: Any) -> tuple[Tensor, Tensor | None]:
    """What its encoder gives: padded in front to a multiple of eight, no mask where nothing is padded."""
    length = 8 * (max(len(each) for each in prompt) // 8 + 1)
    mask = torch.stack([torch.arange(length).flip(0) <= len(each) for each in prompt])
    rows = torch.cat([draw(1, length, 24, seed=len(each)) for each in prompt]) * mask[..., None]
    return rows, None if mask.all() else mask.long()


SPECIMENS = (
    Specimen(
        "NucleusMoEImageTransformer2DModel",
        {
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 5,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 24,
            "axes_dims_rope": (4, 4, 8),
            "num_experts": 2,
            "mlp_ratio": 8.0,
            "moe_intermediate_dim": 16,
            "capacity_factors": 1.0,
        },
        pipeline="NucleusMoEImagePipeline",
        vae=vaes.qwen,
        call=lambda count: {**masked(count, mask="prompt_embeds_mask"), "guidance_scale": 3.0},
        missing=("text_encoder", "processor"),
        # Its guidance always rescales.
        plain={"guidance_scale": 1.0},
        stubs={"encode_prompt": read},
    ),
)
