"""Krea 2."""

from __future__ import annotations

from typing import Any

import torch

from tests import vaes
from tests.zoo.specimen import Specimen, draw, prompts


def call(count: int) -> dict[str, Any]:
    """Two hidden states for each text token, the last two of them padding."""
    mask = (torch.arange(7) < 5).expand(count, 7)
    embeds = prompts("prompt_embeds", 7, 2, 24, count=count)
    return {**embeds, "prompt_embeds_mask": mask, "negative_prompt_embeds_mask": mask, "guidance_scale": 2.0}


SPECIMENS = (
    Specimen(
        "Krea2Transformer2DModel",
        {
            "in_channels": 16,
            "num_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "intermediate_size": 32,
            "timestep_embed_dim": 16,
            "text_hidden_dim": 24,
            "num_text_layers": 2,
            "text_num_attention_heads": 2,
            "text_num_key_value_heads": 2,
            "text_intermediate_size": 32,
            "num_layerwise_text_blocks": 1,
            "num_refiner_text_blocks": 1,
            "axes_dims_rope": (4, 4, 8),
        },
        pipeline="Krea2Pipeline",
        vae=vaes.qwen,
        call=call,
        stubs={
            "get_text_hidden_states": lambda prompt, length, device: (
                torch.cat([draw(1, length, 2, 24, seed=len(each)) for each in prompt]),
                torch.stack([torch.arange(length) <= len(each) for each in prompt]),
            )
        },
    ),
)
