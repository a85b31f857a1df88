"""Kandinsky 5, text-to-image, and the transformer of its image-to-image models."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from tests import vaes
from tests.zoo.specimen import Specimen, draw, prompts

SIZES = {
    "in_visual_dim": 4,
    "out_visual_dim": 4,
    "in_text_dim": 24,
    "in_text_dim2": 16,
    "time_dim": 16,
    "model_dim": 32,
    "ff_dim": 32,
    "num_text_blocks": 1,
    "num_visual_blocks": 1,
    "axes_dims": (4, 4, 8),
}


def _call(count: int) -> dict[str, Any]:
    ends = torch.arange(count + 1) * 7
    return {
        **prompts("prompt_embeds_qwen", 7, 24, count=count),
        **prompts("prompt_embeds_clip", 16, count=count),
        "prompt_cu_seqlens": ends,
        "negative_prompt_cu_seqlens": ends,
        "guidance_scale": 3.0,
    }


def _text(prompt: list[str], **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """As the stock method: as long as the longest of the batch, and where each text ends in all."""
    rows = [draw(len(text) + 3, 24, seed=len(text)) for text in prompt]
    longest = max(map(len, rows))
    lengths = torch.tensor([0, *map(len, rows)])
    return torch.stack([torch.cat([row, draw(longest - len(row), 24)]) for row in rows]), lengths.cumsum(0)


def _prepare(pipeline: Any, height: int, width: int) -> None:
    pipeline.resolutions = [(width, height)]


SPECIMENS = (
    Specimen(
        "Kandinsky5Transformer3DModel",
        SIZES,
        pipeline="Kandinsky5T2IPipeline",
        vae=lambda: vaes.kl(8, shift_factor=None),
        call=_call,
        factor=8,
        missing=("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
        prepare=_prepare,
        stubs={
            "text_encoder": SimpleNamespace(dtype=torch.float32),
            "_encode_prompt_qwen": _text,
            "_encode_prompt_clip": lambda prompt, **more: torch.stack([draw(16, seed=len(text)) for text in prompt]),
        },
        float32=True,
    ),
)
