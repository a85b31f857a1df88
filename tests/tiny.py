"""Untrained fixtures: tiny pipelines with random weights, one per architecture, made in moments."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)

from liftkit.lift import Lift

FACTOR, CHANNELS, LATENT_PATCH = 2, 4, 2
PATCH = FACTOR * LATENT_PATCH
RANK, DIM = CHANNELS * LATENT_PATCH**2, 3 * PATCH**2
VAE = {
    "block_out_channels": (8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "latent_channels": CHANNELS,
    "norm_num_groups": 4,
    "mid_block_add_attention": False,
    "sample_size": 16,
}


FLUX2 = {
    "patch_size": 1,
    "in_channels": RANK,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "timestep_guidance_channels": 32,
    "axes_dims_rope": (4, 4, 4, 4),
    "guidance_embeds": False,
}
SD3 = {
    "sample_size": 8,
    "patch_size": LATENT_PATCH,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "joint_attention_dim": 24,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 16,
    "pos_embed_max_size": 12,
}


def flux2_transformer(**changes: Any) -> Flux2Transformer2DModel:
    return _alive(Flux2Transformer2DModel(**{**FLUX2, **changes}))


def sd3_transformer(**changes: Any) -> SD3Transformer2DModel:
    return _alive(SD3Transformer2DModel(**{**SD3, **changes}))


TRANSFORMERS: dict[str, Callable[..., Any]] = {
    "Flux2Transformer2DModel": flux2_transformer,
    "SD3Transformer2DModel": sd3_transformer,
}


def flux2_pipeline(**scheduler: Any) -> Flux2KleinPipeline:
    """A klein without text side; give ``prompt_embeds``."""
    vae = AutoencoderKLFlux2(**VAE)
    vae.bn.running_mean.normal_(std=0.2)
    vae.bn.running_var.uniform_(0.3, 2.0)
    return Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 2.0, **scheduler}),
        vae=vae.eval(),
        text_encoder=None,
        tokenizer=None,
        transformer=flux2_transformer(),
    )


def sd3_pipeline(**scheduler: Any) -> StableDiffusion3Pipeline:
    """An SD3 without text side; give ``prompt_embeds`` and ``pooled_prompt_embeds``."""
    return StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **scheduler}),
        vae=AutoencoderKL(**VAE, scaling_factor=1.5305, shift_factor=0.0609).eval(),
        transformer=sd3_transformer(),
        **dict.fromkeys(TEXT_SIDE["sd3"]),
    )


TEXT_SIDE = {
    "flux2": ("text_encoder", "tokenizer"),
    "sd3": ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3"),
}
"""Components that the fixtures do without, and that loaders have to be given as None."""

PIPELINES: dict[str, Callable[..., Any]] = {"flux2": flux2_pipeline, "sd3": sd3_pipeline}


def prompt_arguments(name: str, batch: int = 1) -> dict[str, torch.Tensor]:
    """Random prompt embeddings for a pipeline, with their negatives."""
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(batch, *shape, generator=generator)

    arguments = {"prompt_embeds": draw(7, 24), "negative_prompt_embeds": draw(7, 24)}
    if name == "sd3":
        arguments |= {"pooled_prompt_embeds": draw(16), "negative_pooled_prompt_embeds": draw(16)}
    return arguments


def lift(scale: float = 1.7, seed: int = 0, **changes: Any) -> Lift:
    """A random lift of the fixtures' geometry."""
    random = torch.randn(DIM, RANK, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    choices = {"patch_size": PATCH, "latent_patch": LATENT_PATCH, **changes}
    return Lift(torch.linalg.qr(random)[0], scale, **choices)


def save(pipeline: Any, folder: Path) -> Path:
    """Write a pipeline and return its folder."""
    pipeline.save_pretrained(folder)
    return folder


def _alive(model: Any) -> Any:
    """Random weights in every layer: fresh diffusers models have silent gates that would hide mistakes."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.3 if parameter.ndim < 2 else 1.2 / parameter[0].numel() ** 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
    return model.eval()
