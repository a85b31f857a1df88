"""Bria FIBO 2."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from tests import vaes
from tests.zoo.specimen import Specimen, draw, prompts


def read(text_encoder: Any, processor: Any, prompt: list[str], *images: Any, **more: Any) -> Any:
    """Two bundles of hidden states, padded to the longest, with a mask."""
    texts = [prompt] if isinstance(prompt, str) else prompt
    longest = max(len(each) for each in texts) + 1
    mask = torch.stack([torch.arange(longest) <= len(each) for each in texts])
    rows = torch.cat([draw(1, 2, 64, 24, seed=len(each))[:, :, :longest] for each in texts])
    return rows * mask[:, None, :, None], mask


SPECIMENS = (
    Specimen(
        "BriaFibo2Transformer2DModel",
        {
            "in_channels": 4,
            "dim": 32,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "cap_feat_dim": 24,
            "injection_layer_ids": (1,),
            "perceiver_num_layers": 1,
            "min_num_gist_tokens": 2,
            "max_num_gist_tokens": 4,
            "gist_step": 2,
            "gist_min_text_len": 4,
            "gist_max_text_len": 16,
            "axes_dims": (4, 4, 8),
            "axes_lens": (64, 32, 32),
        },
        pipeline="BriaFibo2Pipeline",
        vae=vaes.flux2,
        call=lambda count: {**prompts("prompt_embeds", 2, 7, 24, count=count), "guidance_scale": 3.0},
        scheduler=lambda: diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        missing=("text_encoder", "processor"),
        stubs={"_get_qwen_prompt_embeds": read},
    ),
)
