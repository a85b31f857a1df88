"""Wan as text-to-image."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from tests import vaes
from tests.zoo.specimen import Specimen, draw, prompts


def _scheduler() -> Any:
    return diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def _embeds(prompt: Any, max_sequence_length: int = 226, **more: Any) -> torch.Tensor:
    """As the stock method: zeros behind the text."""
    texts = [prompt] if isinstance(prompt, str) else prompt
    rows = torch.stack([draw(max_sequence_length, 24, seed=len(text)) for text in texts])
    kept = torch.arange(max_sequence_length) < torch.tensor([len(text) for text in texts])[:, None]
    return rows * kept[..., None]


SIZES = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "text_dim": 24,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}


def _vae_of_16() -> Any:
    """That of Wan 2.2 5B: patches of 2 x 2 pixels, then as the other."""
    return vaes.wan(is_residual=True, patch_size=2, in_channels=12, out_channels=12, scale_factor_spatial=16)


SPECIMENS = (
    Specimen(
        "WanTransformer3DModel",
        SIZES,
        pipeline="WanPipeline",
        vae=vaes.wan,
        call=lambda count: {**prompts("prompt_embeds", 7, 24, count=count), "guidance_scale": 3.0},
        factor=8,
        scheduler=_scheduler,
        stubs={"_get_t5_prompt_embeds": _embeds},
    ),
    Specimen(
        "WanTransformer3DModel",
        SIZES,
        pipeline="WanPipeline",
        vae=_vae_of_16,
        call=lambda count: {**prompts("prompt_embeds", 7, 24, count=count), "guidance_scale": 3.0},
        factor=16,
        grid=(4, 2),
        scheduler=_scheduler,
        # A time for each token.
        options={"expand_timesteps": True},
        stubs={"_get_t5_prompt_embeds": _embeds},
        variant="2.2-5B",
    ),
)
