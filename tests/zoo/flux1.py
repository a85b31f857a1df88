"""FLUX.1 dev, and the shapes of Fill and Control."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image

from tests import vaes
from tests.zoo.specimen import MMDIT, Specimen, draw, picture, prompts

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
SAME: Any = dict.fromkeys(("save", "reference", "lora", "convert", "finetune", "prompts"), "as without its picture")
MASK = Image.new("L", (16, 32), 0)
MASK.paste(255, (4, 8, 16, 32))


def _edit(count: int, **more: Any) -> dict[str, Any]:
    call = {name: value for name, value in _call(count).items() if not name.startswith(("negative", "true"))}
    return {**call, **more}


SPECIMENS = (
    Specimen("FluxTransformer2DModel", CONFIG, "FluxPipeline", vaes.kl, _call, missing=ENCODERS, stubs=STUBS),
    Specimen(
        "FluxTransformer2DModel",
        CONFIG,
        "FluxKontextPipeline",
        vaes.kl,
        lambda count: {**_call(count), "image": picture(), "max_area": 32 * 16, "_auto_resize": False},
        missing=(*ENCODERS, "image_encoder", "feature_extractor"),
        without=SAME,
        variant="kontext",
    ),
    Specimen(
        "FluxTransformer2DModel",
        # Noisy latents, those of the masked image, and a mask of factor x factor x 2 x 2.
        {**CONFIG, "in_channels": 16 + 16 + 16, "out_channels": 16},
        "FluxFillPipeline",
        vaes.kl,
        lambda count: _edit(count, image=picture(16, 32), mask_image=MASK),
        missing=ENCODERS,
        stubs=STUBS,
        variant="fill",
    ),
    Specimen(
        "FluxTransformer2DModel",
        {**CONFIG, "in_channels": 16 + 16, "out_channels": 16},
        "FluxControlPipeline",
        vaes.kl,
        lambda count: _edit(count, control_image=picture(16, 32)),
        missing=ENCODERS,
        stubs=STUBS,
        variant="control",
    ),
)
