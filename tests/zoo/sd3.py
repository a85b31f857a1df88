"""Stable Diffusion 3."""

from __future__ import annotations

from tests import tiny, vaes
from tests.zoo.specimen import Specimen, prompts

SPECIMENS = (
    Specimen(
        "SD3Transformer2DModel",
        {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "joint_attention_dim": 24,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 16,
            "pos_embed_max_size": 16,
        },
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
