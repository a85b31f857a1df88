"""LongCat-Image. Its pipeline fails on ready prompt embeddings, so that the reading of texts is replaced."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests import vaes
from tests.zoo.specimen import MMDIT, Specimen, draw


def read(texts: list[str]) -> Tensor:
    """Random embeddings of 512 tokens for each text."""
    return torch.cat([draw(1, 512, 24, seed=len(text)) for text in texts])


def prepare(pipeline: Any, height: int, width: int) -> None:
    """Replaces the reading of texts."""
    pipeline._encode_prompt = read


SPECIMENS = (
    Specimen(
        "LongCatImageTransformer2DModel",
        {"in_channels": 16, "num_layers": 1, "num_single_layers": 1, "pooled_projection_dim": 16, **MMDIT},
        pipeline="LongCatImagePipeline",
        vae=vaes.kl,
        call=lambda count: {
            "prompt": ["a cat"] * count,
            "negative_prompt": [""] * count,
            "guidance_scale": 3.0,
            "enable_prompt_rewrite": False,
        },
        missing=("text_encoder", "tokenizer", "text_processor"),
        prepare=prepare,
        stubs={"_encode_prompt": read},
        plain={"enable_cfg_renorm": False},
    ),
)
