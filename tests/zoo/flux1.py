"""FLUX.1 dev, and the shapes of Fill and Control."""

from __future__ import annotations

from typing import Any

import torch

from tests import vaes
from tests.zoo.specimen import MMDIT, Specimen, draw, prompts

CONFIG = {
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "pooled_projection_dim": 16,
    "guidance_embeds": True,
    **MMDIT,
}


def _call(count: int) -> dict[str, Any]:
    return {
        **prompts("prompt_embeds", 7, 24, count=count),
        **prompts("pooled_prompt_embeds", 16, count=count),
        "guidance_scale": 3.5,
        "true_cfg_scale": 3.0,
    }


ENCODERS = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
STUBS = {
    "_get_t5_prompt_embeds": lambda prompt, **more: torch.stack([draw(32, 24, seed=len(text)) for text in prompt]),
    "_get_clip_prompt_embeds": lambda prompt, **more: torch.stack([draw(16, seed=len(text)) for text in prompt]),
}
OTHER = "its pipeline takes an image, which the suite does not give"
WITHOUT: Any = dict.fromkeys(("pipeline", "convert", "finetune", "prompts"), OTHER)
SPECIMENS = (
    Specimen("FluxTransformer2DModel", CONFIG, "FluxPipeline", vaes.kl, _call, missing=ENCODERS, stubs=STUBS),
    Specimen(
        "FluxTransformer2DModel",
        # Noisy latents, those of the masked image, and a mask of factor x factor x 2 x 2.
        {**CONFIG, "in_channels": 16 + 16 + 16, "out_channels": 16},
        without=WITHOUT,
        variant="fill",
    ),
    Specimen(
        "FluxTransformer2DModel",
        {**CONFIG, "in_channels": 16 + 16, "out_channels": 16},
        without=WITHOUT,
        variant="control",
    ),
)
