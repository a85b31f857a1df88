"""Lumina-Image 2."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests import vaes
from tests.zoo.specimen import Specimen, draw, masked


def _gemma(prompt: list[str], device: Any, max_sequence_length: int) -> tuple[Tensor, Tensor]:
    rows = torch.stack([draw(max_sequence_length, 24, seed=len(text)) for text in prompt])
    return rows, torch.stack([(torch.arange(max_sequence_length) < len(text)).long() for text in prompt])


def _gives_a_system_prompt(pipeline: Any, height: int, width: int) -> None:
    pipeline.system_prompt = "be good"


SPECIMENS = (
    Specimen(
        "Lumina2Transformer2DModel",
        {
            "sample_size": 8,
            "in_channels": 4,
            "hidden_size": 48,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "num_attention_heads": 3,
            "num_kv_heads": 1,
            "multiple_of": 8,
            "axes_dim_rope": (4, 4, 8),
            "axes_lens": (300, 32, 32),
            "cap_feat_dim": 24,
        },
        pipeline="Lumina2Pipeline",
        vae=lambda: vaes.kl(8),  # a factor of 8, which the pipeline takes for granted
        call=lambda count: {**masked(count), "guidance_scale": 3.0},
        factor=8,
        plain={"cfg_normalization": False},
        prepare=_gives_a_system_prompt,
        stubs={"_get_gemma_prompt_embeds": _gemma},
    ),
)
