"""GLM-Image: its prior tokens are given, in the place of the autoregressive model that draws them."""

from __future__ import annotations

from typing import Any

import torch

from tests import vaes
from tests.zoo.cogview4 import shifts_noise_alone
from tests.zoo.specimen import Specimen, prompts

GRID = (8, 4)


def _call(count: int) -> dict[str, Any]:
    tokens = torch.randint(0, 64, (count, GRID[0] * GRID[1]), generator=torch.Generator().manual_seed(0))
    return {**prompts("prompt_embeds", 7, 24, count=count), "prior_token_ids": tokens, "guidance_scale": 3.0}


SPECIMENS = (
    Specimen(
        "GlmImageTransformer2DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "text_embed_dim": 24,
            "time_embed_dim": 16,
            "condition_dim": 8,
            "prior_vq_quantizer_codebook_size": 64,
        },
        pipeline="GlmImagePipeline",
        vae=lambda: vaes.kl(8, latents_mean=vaes.MEAN, latents_std=vaes.STD),
        call=_call,
        factor=8,
        grid=GRID,
        missing=("tokenizer", "processor", "text_encoder", "vision_language_encoder"),
        scheduler=shifts_noise_alone,
        without={
            "finetune": "prior tokens depend on caption and size",
            "prompts": "prior tokens depend on caption and size",
        },
    ),
)
