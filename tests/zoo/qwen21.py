"""Qwen-Image 2.1."""

from __future__ import annotations

from typing import Any

import torch

from tests import vaes
from tests.zoo.qwen import _embeds as _rows
from tests.zoo.specimen import Specimen, prompts, speller


def _processor() -> Any:
    """One of another class than the released models': theirs needs torchvision, which the suite does without."""
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    template = "{% for message in messages %}{{ message['role'] }}{% endfor %}"
    return LlavaProcessor(CLIPImageProcessorPil(), speller(), patch_size=14, chat_template=template)


def _embeds(prompt: Any, image: Any = None, device: Any = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    text, mask = _rows(prompt)
    return text, mask, torch.zeros(mask.shape, dtype=torch.bool)


SPECIMENS = (
    Specimen(
        "QwenImage21Transformer2DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "context_in_dim": 24,
            "axes_dims_rope": (4, 6, 6),
        },
        pipeline="QwenImage21Pipeline",
        vae=vaes.qwen21,
        call=lambda count: {**prompts("prompt_embeds", 7, 24, count=count), "true_cfg_scale": 3.0},
        factor=16,
        patch=1,
        grid=(4, 2),
        missing=("text_encoder",),
        components=lambda: {"processor": _processor()},
        # Its norms and times are computed in float32 whatever the weights are.
        float32=True,
        stubs={"_get_qwen_prompt_embeds": _embeds},
    ),
)
