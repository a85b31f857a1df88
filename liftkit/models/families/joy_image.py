"""JoyImage-Edit: a state of items (references, then the noise), which the network lays behind each other as frames; Wan's VAE,
prompts without a mask, and guidance that rescales the velocity to the norm of the conditional one, element by element.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from liftkit.models.conditioning import padded, random, trimmed
from liftkit.models.layout import Layout
from liftkit.models.spec import Architecture, Clock, Grid, Projection

LENGTH = 1024
"""Tokens of a prompt where the model's folder names no other number."""


def _arguments(grid: Grid, given: Mapping[str, Any]) -> dict[str, Any]:
    return {"encoder_hidden_states": trimmed(given["encoder_hidden_states"], given["text_mask"])[0]}


def _references(arguments: Mapping[str, Any]) -> Tensor | None:
    """All items but the last."""
    state = arguments["hidden_states"]
    return torch.arange(state.shape[1], device=state.device) < state.shape[1] - 1 if state.shape[1] > 1 else None


def _beside(state: Tensor, references: list[Tensor], arguments: dict[str, Any]) -> Tensor:
    """References are items before the state's."""
    return torch.cat([*references, state], 1)


def _rescale(guided: Tensor, conditional: Tensor, call: Mapping[str, Any]) -> Tensor:
    """To the norm of the conditional velocity (B, N, C, 1, h, w), over the channels."""
    return guided * (conditional.norm(dim=2, keepdim=True) / guided.norm(dim=2, keepdim=True).clamp_min(1e-6))


def _prompts(pipeline: Any, prompts: list[str], length: int | None) -> dict[str, Tensor]:
    length = length or LENGTH
    embeds, mask = pipeline.encode_prompt(prompts, device=pipeline._execution_device, max_sequence_length=length)
    text, mask = padded([row[on] for row, on in zip(embeds, mask.bool())], length)
    return {"encoder_hidden_states": text, "text_mask": mask}


def _shown_beside(pipeline: str, height: int, width: int) -> tuple[int, int]:
    """What the VAE is shown: the nearest of the pipeline's own sizes."""
    from diffusers.pipelines.joyimage.image_processor import JoyImageEditImageProcessor

    found: tuple[int, int] = JoyImageEditImageProcessor().get_default_height_width(None, height, width)
    return found


def _prompts_beside(pipeline: Any, prompt: str, pictures: list[Any]) -> dict[str, Tensor]:
    """The encoder is shown what the VAE is: the picture at the nearest of the pipeline's own sizes."""
    processor = pipeline.vae_image_processor
    seen = [processor.resize_center_crop(each, processor.get_default_height_width(each)) for each in pictures]
    text, mask = pipeline.encode_prompt_multiple_images([prompt], images=seen, device=pipeline._execution_device)
    row = text[0][mask[0].bool()]
    return {"encoder_hidden_states": row, "text_mask": torch.ones(len(row), dtype=torch.bool)}


JOY_IMAGE = Architecture(
    name="JoyImageEditTransformer3DModel",
    inputs=(Projection("img_in", "cpq"),),
    outputs=(Projection("proj_out", "pqc"),),
    layout=Layout.ITEMS,
    clock=Clock.THOUSAND_SIGMA,
    conditioning=random(encoder_hidden_states=(7, "text_dim"), text_mask=(7,)),
    arguments=_arguments,
    clean_tokens=_references,
    beside=_beside,
    references={"JoyImageEditPipeline": range(1, 2)},
    adapters=(
        "double_blocks.*.img_mlp.net.0.proj",
        "double_blocks.*.img_mlp.net.2",
        "double_blocks.*.attn.img_attn_proj",
    ),
    rescale=_rescale,
    encoders=("text_encoder", "tokenizer", "processor"),
    prompts=_prompts,
    prompts_beside=_prompts_beside,
    shown_beside=_shown_beside,
)
