"""Qwen-Image, and the transformers of Edit and Layered."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from tests import vaes
from tests.zoo.specimen import MMDIT, Specimen, draw, masked, picture

SIZES = {"in_channels": 16, "out_channels": 4, "num_layers": 2, **MMDIT}
ENCODERS = ("text_encoder", "tokenizer", "processor")


def _embeds(prompt: list[str], *args: Any, **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """As the stock method: as long as the longest of the batch, with a mask."""
    texts = [prompt] if isinstance(prompt, str) else prompt
    rows = [draw(len(text) + 3, 24, seed=len(text)) for text in texts]
    longest = max(map(len, rows))
    mask = torch.stack([torch.arange(longest) < len(row) for row in rows]).long()
    return torch.stack([torch.cat([row, row.new_zeros(longest - len(row), 24)]) for row in rows]), mask


def _call(count: int) -> dict[str, Any]:
    return {**masked(count, mask="prompt_embeds_mask"), "true_cfg_scale": 3.0}


def _of_size(pipeline: str, size: tuple[Any, ...]) -> Any:
    """The pipelines that edit scale pictures to a megapixel; here to the size of the answer."""
    module = f"diffusers.pipelines.qwenimage.pipeline_qwenimage_{pipeline}"
    return patch(f"{module}.calculate_dimensions", lambda *args: size)


def _prepare_layered(pipeline: Any, height: int, width: int) -> None:
    pipeline.text_encoder = SimpleNamespace(dtype=torch.float32)
    pipeline.get_image_caption = lambda *args, **more: "a picture"


SPECIMENS = (
    Specimen(
        "QwenImageTransformer2DModel",
        SIZES,
        pipeline="QwenImagePipeline",
        vae=vaes.qwen,
        call=_call,
        plain={"true_cfg_scale": 1.0},
        stubs={"_get_qwen_prompt_embeds": _embeds},
    ),
    Specimen(
        "QwenImageTransformer2DModel",
        {**SIZES, "zero_cond_t": True},
        pipeline="QwenImageEditPipeline",
        vae=vaes.qwen,
        call=lambda count: {**_call(count), "image": picture()},
        plain={"true_cfg_scale": 1.0},
        missing=ENCODERS,
        around=lambda height, width: _of_size("edit", (width, height, None)),
        stubs={"_get_qwen_prompt_embeds": _embeds},
        variant="edit",
    ),
    Specimen(
        "QwenImageTransformer2DModel",
        {**SIZES, "zero_cond_t": True},
        pipeline="QwenImageEditPlusPipeline",
        vae=vaes.qwen,
        call=lambda count: {**_call(count), "image": [picture(), picture(seed=4)]},
        plain={"true_cfg_scale": 1.0},
        missing=ENCODERS,
        around=lambda height, width: _of_size("edit_plus", (width, height)),
        without=dict.fromkeys(("save", "reference", "lora", "convert", "finetune", "prompts"), "as with one picture"),
        variant="edit-plus",
    ),
    Specimen(
        "QwenImageTransformer2DModel",
        # Not four channels of latents: the pipeline would take pictures with opacity for them.
        {**SIZES, "in_channels": 32, "out_channels": 8, "use_additional_t_cond": True, "use_layer3d_rope": True},
        pipeline="QwenImageLayeredPipeline",
        vae=lambda: vaes.qwen(input_channels=4, z_dim=8, latents_mean=vaes.MEAN * 2, latents_std=vaes.STD * 2),
        channels=8,
        call=lambda count: {**_call(count), "image": picture().convert("RGBA"), "layers": 2, "cfg_normalize": True},
        plain={"cfg_normalize": False},
        missing=ENCODERS,
        prepare=_prepare_layered,
        around=lambda height, width: _of_size("layered", (width, height)),
        images=3,
        stubs={"_get_qwen_prompt_embeds": _embeds},
        variant="layered",
    ),
)
