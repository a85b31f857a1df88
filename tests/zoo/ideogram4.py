"""Ideogram 4: two transformers. Its pipeline takes no ready prompt embeddings, so that the reading of texts is replaced."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers import Ideogram4Pipeline

from tests import tiny, vaes
from tests.zoo.specimen import Specimen, draw

CONFIG: dict[str, Any] = {
    "in_channels": 16,
    "num_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "adaln_dim": 16,
    "llm_features_dim": 24,
    "mrope_section": (4, 2, 2),
}


def read(prompt: list[str], grid_h: int, grid_w: int, max_sequence_length: int, device: Any) -> Any:
    """Texts padded in front, zeros in the image's place, and the pipeline's own ids."""
    lengths = [len(each) for each in prompt]
    if max(lengths) > max_sequence_length:
        raise ValueError(f"prompt has {max(lengths)} tokens, exceeds max_sequence_length={max_sequence_length}")
    text = torch.cat([draw(1, max_sequence_length, 24, seed=each) for each in lengths])
    ids = Ideogram4Pipeline._prepare_ids(lengths, grid_h, grid_w, max_sequence_length, device)
    text = text * (ids[2][:, :max_sequence_length] == 3)[..., None]
    return torch.cat([text, torch.zeros(len(text), grid_h * grid_w, 24)], dim=1), *ids


def prepare(pipeline: Any, height: int, width: int) -> None:
    """Replaces the reading of texts."""
    pipeline.encode_prompt = read


def second() -> dict[str, Any]:
    """The transformer of unconditional predictions, with weights of its own."""
    model = tiny._alive(diffusers.Ideogram4Transformer2DModel(**CONFIG))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    return {"unconditional_transformer": model}


SPECIMENS = (
    Specimen(
        "Ideogram4Transformer2DModel",
        CONFIG,
        pipeline="Ideogram4Pipeline",
        vae=vaes.flux2,
        call=lambda count: {
            "prompt": ["a cat", "two dogs"][:count],
            "guidance_scale": 3.0,
            "guidance_schedule": None,
            "max_sequence_length": 12,
        },
        components=second,
        missing=("text_encoder", "tokenizer"),
        prepare=prepare,
        stubs={"encode_prompt": read},
    ),
)
