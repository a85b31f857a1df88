"""HunyuanImage 2.1."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from diffusers.guiders import ClassifierFreeGuidance

from tests import vaes
from tests.zoo.specimen import Specimen, draw, prompts


def _call(count: int) -> dict[str, Any]:
    masks = {"prompt_embeds_mask": torch.ones(count, 7), "prompt_embeds_mask_2": torch.ones(count, 5)}
    return {
        **prompts("prompt_embeds", 7, 24, count=count),
        **prompts("prompt_embeds_2", 5, 16, count=count),
        **masks,
        **{f"negative_{name}": mask for name, mask in masks.items()},
    }


def _text(tokenizer: Any, text_encoder: Any, prompt: list[str], **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
    lengths = torch.tensor([len(text) + 1 for text in prompt])
    return torch.stack([draw(40, 24, seed=len(text)) for text in prompt]), (torch.arange(40) < lengths[:, None]).long()


def _glyphs(tokenizer: Any, text_encoder: Any, prompt: str, **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return draw(1, 128, 16, seed=len(prompt)), (torch.arange(128)[None] < len(prompt)).long()


SPECIMENS = (
    Specimen(
        "HunyuanImageTransformer2DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "text_embed_dim": 24,
            "text_embed_2_dim": 16,
            "rope_axes_dim": (8, 8),
        },
        pipeline="HunyuanImagePipeline",
        vae=vaes.hunyuan,
        call=_call,
        factor=4,
        patch=1,
        missing=("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
        components=lambda: {name: ClassifierFreeGuidance(guidance_scale=3.0) for name in ("guider", "ocr_guider")},
        remark="with classifier-free guidance; with the released guider by liftkit.guided alone",
        stubs={
            "text_encoder_2": SimpleNamespace(config=SimpleNamespace(d_model=16)),
            "_get_qwen_prompt_embeds": _text,
            "_get_byt5_prompt_embeds": _glyphs,
        },
    ),
)
