"""Stable Diffusion 3."""

from __future__ import annotations

from tests import tiny, vaes
from tests.zoo.specimen import Specimen, prompts

SPECIMENS = (
    Specimen(
        "SD3Transformer2DModel",
        {**tiny.SD3, "pos_embed_max_size": 16},
        pipeline="StableDiffusion3Pipeline",
        vae=vaes.kl,
        call=lambda count: {
            **prompts("prompt_embeds", 7, 24, count=count),
            **prompts("pooled_prompt_embeds", 16, count=count),
            "guidance_scale": 3.0,
        },
        missing=tiny.TEXT_SIDE["sd3"],
        without={"prompts": "the text encoders are real ones in tests/test_finetune.py"},
    ),
)
