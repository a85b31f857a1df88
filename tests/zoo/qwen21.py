"""Qwen-Image 2.1."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from tests import vaes
from tests.zoo.qwen import _embeds as _rows
from tests.zoo.specimen import Specimen, prompts


class Processor:
    """What the pipeline asks of its processor when it is made."""

    tokenizer = SimpleNamespace(encode=lambda text: [3])

    def apply_chat_template(self, *args: Any, **more: Any) -> list[list[int]]:
        """Tokens of the system's message."""
        return [[0, 1]]


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
        components=lambda: {"processor": Processor()},
        # Its norms and times are computed in float32 whatever the weights are.
        float32=True,
        without=dict.fromkeys(
            ("convert", "finetune"), "its pipeline is not made without a processor, of which there is no tiny one"
        ),
        stubs={"_get_qwen_prompt_embeds": _embeds},
    ),
)
