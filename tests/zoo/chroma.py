"""Chroma."""

from __future__ import annotations

from typing import Any

import torch

from tests import vaes
from tests.zoo.specimen import MMDIT, Specimen, draw, masked


def call(count: int) -> dict[str, Any]:
    """Masks as numbers, as its text encoder's side makes them; the last two tokens are padding."""
    mask = (torch.arange(7) < 5).float().expand(count, 7)
    return {
        **masked(count),
        "prompt_attention_mask": mask,
        "negative_prompt_attention_mask": mask,
        "guidance_scale": 3.0,
    }


SPECIMENS = (
    Specimen(
        "ChromaTransformer2DModel",
        {
            "in_channels": 16,
            "num_layers": 1,
            "num_single_layers": 1,
            "approximator_num_channels": 8,
            "approximator_hidden_dim": 16,
            "approximator_layers": 1,
            **MMDIT,
        },
        pipeline="ChromaPipeline",
        vae=vaes.kl,
        call=call,
        stubs={
            "_get_t5_prompt_embeds": lambda prompt, max_sequence_length, **more: (
                torch.cat([draw(1, max_sequence_length, 24, seed=len(each)) for each in prompt]),
                torch.stack([(torch.arange(max_sequence_length) <= len(each)).float() for each in prompt]),
            )
        },
    ),
)
