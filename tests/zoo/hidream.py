"""HiDream-I1."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests import vaes
from tests.zoo.specimen import Specimen, draw, prompts


def _call(count: int) -> dict[str, Any]:
    llama = {
        "prompt_embeds_llama3": draw(4, count, 7, 24),
        "negative_prompt_embeds_llama3": draw(4, count, 7, 24, seed=6),
    }
    t5 = prompts("prompt_embeds_t5", 7, 24, count=count)
    return {**t5, **llama, **prompts("pooled_prompt_embeds", 16, count=count), "guidance_scale": 3.0}


def _any_size(pipeline: Any, height: int, width: int) -> None:
    """It scales every size to about one, in pixels."""
    pipeline.default_sample_size = (height * width) ** 0.5 / pipeline.vae_scale_factor


def _drawn(*shape: int) -> Any:
    return lambda prompt: torch.stack([draw(*shape, seed=len(text)) for text in prompt])


def _t5(prompt: list[str], length: int, *more: Any) -> Tensor:
    return _drawn(length, 24)(prompt)


def _llama(prompt: list[str], length: int, *more: Any) -> Tensor:
    return _drawn(4, length, 24)(prompt).transpose(0, 1)


SPECIMENS = (
    Specimen(
        "HiDreamImageTransformer2DModel",
        {
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "caption_channels": [24, 24],
            "text_emb_dim": 16,
            "axes_dims_rope": (8, 4, 4),
            "max_resolution": (32, 32),
            "llama_layers": [0, 1],
            "num_routed_experts": 2,
            "num_activated_experts": 1,
            "force_inference_output": True,
        },
        pipeline="HiDreamImagePipeline",
        vae=vaes.kl,
        call=_call,
        missing=tuple(f"{each}{number}" for each in ("text_encoder", "tokenizer") for number in ("", "_2", "_3", "_4")),
        prepare=_any_size,
        stubs={
            "_get_clip_prompt_embeds": lambda tokenizer, encoder, prompt, *more: _drawn(8)(prompt),
            "_get_t5_prompt_embeds": _t5,
            "_get_llama3_prompt_embeds": _llama,
        },
    ),
)
