"""FLUX.2 klein."""

from __future__ import annotations

from tests import tiny, vaes
from tests.zoo.specimen import Specimen, prompts

SPECIMENS = (
    Specimen(
        "Flux2Transformer2DModel",
        {
            "patch_size": 1,
            "in_channels": tiny.RANK,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 24,
            "timestep_guidance_channels": 32,
            "axes_dims_rope": (4, 4, 4, 4),
            "guidance_embeds": False,
        },
        pipeline="Flux2KleinPipeline",
        vae=vaes.flux2,
        call=lambda count: {**prompts("prompt_embeds", 7, 24, count=count), "guidance_scale": 3.0},
        without={"prompts": "tests/test_tiny_klein.py runs the real text encoder"},
    ),
)
