"""Ovis-Image."""

from __future__ import annotations

import torch

from tests import vaes
from tests.zoo.specimen import MMDIT, Specimen, draw, prompts

SPECIMENS = (
    Specimen(
        "OvisImageTransformer2DModel",
        {"in_channels": 16, "out_channels": 16, "num_layers": 1, "num_single_layers": 1, **MMDIT},
        pipeline="OvisImagePipeline",
        vae=vaes.kl,
        call=lambda count: {
            **prompts("prompt_embeds", 7, 24, count=count),
            "negative_prompt": None,
            "guidance_scale": 3.0,
        },
        stubs={
            "_get_ovis_prompt_embeds": lambda prompt, max_sequence_length, **more: torch.cat(
                [draw(1, max_sequence_length, 24, seed=len(each)) for each in prompt]
            )
        },
    ),
)
