"""Lumina-Next."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests import vaes
from tests.zoo.specimen import Specimen, draw, masked


def _gemma(prompt: list[str], **more: Any) -> tuple[Tensor, Tensor]:
    """Padded to the longest, in eights."""
    longest = -(-max(map(len, prompt)) // 8) * 8
    rows = torch.stack([draw(longest, 24, seed=len(text)) for text in prompt])
    return rows, torch.stack([(torch.arange(longest) < len(text)).long() for text in prompt])


SPECIMENS = (
    Specimen(
        "LuminaNextDiT2DModel",
        {
            "sample_size": 8,
            "in_channels": 4,
            "hidden_size": 32,
            "num_layers": 2,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "multiple_of": 8,
            "cross_attention_dim": 24,
            "learn_sigma": True,
        },
        pipeline="LuminaPipeline",
        vae=lambda: vaes.kl(8, shift_factor=None),
        # Guidance acts on three latent channels of four: without it.
        call=lambda count: {**masked(count), "guidance_scale": 1.0},
        factor=8,
        stubs={"_get_gemma_prompt_embeds": _gemma},
    ),
)
