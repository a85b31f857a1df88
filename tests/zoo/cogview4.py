"""CogView4, with and without control."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import Tensor

from tests import vaes
from tests.zoo.specimen import Specimen, draw, picture, prompts

CONFIG = {
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "text_embed_dim": 24,
    "time_embed_dim": 16,
    "condition_dim": 8,
    "sample_size": 8,
    "rope_axes_dim": (16, 16),
}


def shifts_noise_alone() -> Any:
    """The scheduler of CogView4 and GLM-Image."""
    return diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.25,
        max_shift=0.75,
        base_image_seq_len=256,
        max_image_seq_len=4096,
        time_shift_type="linear",
    )


def _glm(prompt: list[str], max_sequence_length: int, *more: Any) -> Tensor:
    longest = min(max_sequence_length, max(map(len, prompt)))
    padded = -(-longest // 16) * 16
    return torch.stack([draw(padded, 24, seed=len(text)) for text in prompt])


def _call(count: int) -> dict[str, Any]:
    return {**prompts("prompt_embeds", 16, 24, count=count), "guidance_scale": 3.0}


SPECIMENS = (
    Specimen(
        "CogView4Transformer2DModel",
        CONFIG,
        pipeline="CogView4Pipeline",
        vae=lambda: vaes.kl(8, shift_factor=0.0),
        call=_call,
        factor=8,
        scheduler=shifts_noise_alone,
        stubs={"_get_glm_embeds": _glm},
    ),
    Specimen(
        "CogView4Transformer2DModel",
        {**CONFIG, "in_channels": 8},
        pipeline="CogView4ControlPipeline",
        vae=lambda: vaes.kl(8, shift_factor=0.0),
        call=lambda count: {**_call(count), "control_image": picture(64, 128)},
        factor=8,
        scheduler=shifts_noise_alone,
        stubs={"_get_glm_embeds": _glm},
        variant="control",
    ),
)
