"""Sana."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from tests import vaes
from tests.zoo.specimen import Specimen, draw, masked


def _scheduler() -> Any:
    return diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )


def _embeds(prompt: list[str], *args: Any, max_sequence_length: int = 300, **more: Any) -> tuple[Any, Any]:
    """As the stock method: padded to one length, with a mask."""
    lengths = torch.tensor([min(len(text), max_sequence_length) for text in prompt])
    rows = torch.stack([draw(max_sequence_length, 24, seed=len(text)) for text in prompt])
    return rows, (torch.arange(max_sequence_length) < lengths[:, None]).long()


CONFIG = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 2,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 8,
    "cross_attention_dim": 16,
    "caption_channels": 24,
    "sample_size": 8,
}
SIZES: Any = {"factor": 4, "patch": 1, "grid": (16, 8)}


def _call(count: int) -> dict[str, Any]:
    return {**masked(count), "guidance_scale": 3.0, "negative_prompt": None}


SPECIMENS = (
    Specimen(
        "SanaTransformer2DModel",
        CONFIG,
        "SanaPipeline",
        vaes.dc,
        _call,
        **SIZES,
        scheduler=_scheduler,
        stubs={"_get_gemma_prompt_embeds": _embeds},
    ),
    Specimen(
        "SanaTransformer2DModel",
        CONFIG,
        "SanaPAGPipeline",
        vaes.dc,
        lambda count: {**_call(count), "pag_scale": 2.0},
        **SIZES,
        scheduler=_scheduler,
        options={"pag_applied_layers": "transformer_blocks.1"},
        without=dict.fromkeys(
            ("save", "reference", "lora", "convert", "finetune", "prompts"), "as without perturbed attention"
        ),
        variant="pag",
    ),
)
