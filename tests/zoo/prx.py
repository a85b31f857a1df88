"""PRX on FLUX.1's VAE and on the deep-compression one."""

from __future__ import annotations

from typing import Any

import torch

from tests import vaes
from tests.zoo.specimen import Specimen, draw, masked

SIZES = {"in_channels": 4, "context_in_dim": 24, "hidden_size": 32, "num_heads": 2, "depth": 2, "axes_dim": [8, 8]}


def _call(count: int) -> dict[str, Any]:
    text = {name: value.bool() if "mask" in name else value for name, value in masked(count).items()}
    return {**text, "guidance_scale": 3.0}


def _text(prompt: list[str], device: Any, *args: Any, **more: Any) -> tuple[Any, Any, None, None]:
    lengths = torch.tensor([len(text) for text in prompt])
    rows = torch.stack([draw(40, 24, seed=len(text)) for text in prompt])
    return rows, torch.arange(40) < lengths[:, None], None, None


SPECIMENS = (
    Specimen(
        "PRXTransformer2DModel",
        {**SIZES, "patch_size": 2},
        pipeline="PRXPipeline",
        vae=vaes.kl,
        call=_call,
        stubs={"_encode_prompt_standard": _text},
    ),
    Specimen(
        "PRXTransformer2DModel",
        {**SIZES, "patch_size": 1, "resolution_embeds": True},
        pipeline="PRXPipeline",
        vae=vaes.dc,
        call=_call,
        factor=4,
        patch=1,
        stubs={"_encode_prompt_standard": _text},
        variant="dc-ae",
    ),
)
