"""Qwen-Image, and the transformers of Edit and Layered."""

from __future__ import annotations

from typing import Any

import torch

from tests import vaes
from tests.zoo.specimen import MMDIT, Specimen, draw, masked

SIZES = {"in_channels": 16, "out_channels": 4, "num_layers": 2, **MMDIT}
REFERENCES = (
    "its pipeline wants pictures and their processor; tests/test_references.py has the transformer with references"
)


def _embeds(prompt: list[str], *args: Any, **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """As the stock method: as long as the longest of the batch, with a mask."""
    texts = [prompt] if isinstance(prompt, str) else prompt
    rows = [draw(len(text) + 3, 24, seed=len(text)) for text in texts]
    longest = max(map(len, rows))
    mask = torch.stack([torch.arange(longest) < len(row) for row in rows]).long()
    return torch.stack([torch.cat([row, row.new_zeros(longest - len(row), 24)]) for row in rows]), mask


SPECIMENS = (
    Specimen(
        "QwenImageTransformer2DModel",
        SIZES,
        pipeline="QwenImagePipeline",
        vae=vaes.qwen,
        call=lambda count: {**masked(count, mask="prompt_embeds_mask"), "true_cfg_scale": 3.0},
        plain={"true_cfg_scale": 1.0},
        stubs={"_get_qwen_prompt_embeds": _embeds},
    ),
    Specimen(
        "QwenImageTransformer2DModel",
        {**SIZES, "zero_cond_t": True},
        variant="edit",
        without=dict.fromkeys(("pipeline", "convert", "prompts", "finetune"), REFERENCES),
    ),
    Specimen(
        "QwenImageTransformer2DModel",
        {**SIZES, "use_additional_t_cond": True, "use_layer3d_rope": True},
        variant="layered",
        without=dict.fromkeys(("pipeline", "convert", "prompts", "finetune"), REFERENCES),
    ),
)
