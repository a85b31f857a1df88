"""Cosmos, of Anima."""

from __future__ import annotations

from enum import Enum
from types import SimpleNamespace
from typing import Any

import torch.nn.functional as F
from diffusers.models.transformers import transformer_cosmos

from tests.zoo.specimen import Specimen


class _Nearest(Enum):
    NEAREST = "nearest"


def _resize(mask: Any, size: list[int], interpolation: _Nearest) -> Any:
    return F.interpolate(mask, size, mode=interpolation.value)


if not hasattr(transformer_cosmos, "transforms"):  # torchvision, which the suite does without
    transformer_cosmos.transforms = SimpleNamespace(
        functional=SimpleNamespace(resize=_resize), InterpolationMode=_Nearest
    )

MODULAR = "diffusers runs Anima by modular pipelines alone"

SPECIMENS = (
    Specimen(
        "CosmosTransformer3DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 2,
            "text_embed_dim": 24,
            "adaln_lora_dim": 8,
            "max_size": (4, 16, 16),
            "extra_pos_embed_type": None,
        },
        without={"pipeline": MODULAR, "convert": MODULAR, "finetune": MODULAR, "prompts": MODULAR},
    ),
)
