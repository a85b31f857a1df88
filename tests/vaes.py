"""Tiny random VAEs, one a class."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from tests import tiny

MEAN, STD = [0.1, -0.2, 0.3, 0.0], [1.5, 2.0, 0.7, 1.0]
PER_CHANNEL = {"z_dim": 4, "latents_mean": MEAN, "latents_std": STD, "num_res_blocks": 1}


def make(name: str, **config: Any) -> Any:
    """A VAE of a class with seeded random weights."""
    torch.manual_seed(1)
    return getattr(diffusers, name)(**config).eval()


def kl(factor: int = 2, **config: Any) -> Any:
    """AutoencoderKL: one scale and one shift."""
    blocks = factor.bit_length()
    sizes = {
        "block_out_channels": (8,) * blocks,
        "down_block_types": ("DownEncoderBlock2D",) * blocks,
        "up_block_types": ("UpDecoderBlock2D",) * blocks,
    }
    return make("AutoencoderKL", **{**tiny.VAE, **sizes, "scaling_factor": 1.5, "shift_factor": 0.06, **config})


def flux2(factor: int = 2, **config: Any) -> Any:
    """AutoencoderKLFlux2: batch norm over packed tokens, with statistics that are not those of a fresh one."""
    blocks = factor.bit_length()
    sizes = {
        "block_out_channels": (8,) * blocks,
        "down_block_types": ("DownEncoderBlock2D",) * blocks,
        "up_block_types": ("UpDecoderBlock2D",) * blocks,
    }
    vae = make("AutoencoderKLFlux2", **{**tiny.VAE, **sizes, **config})
    numbers = torch.randn(2, len(vae.bn.running_mean), generator=torch.Generator().manual_seed(2))
    vae.bn.running_mean.copy_(numbers[0] * 0.3)
    vae.bn.running_var.copy_(numbers[1].exp())
    return vae


def qwen(factor: int = 2, **config: Any) -> Any:
    """AutoencoderKLQwenImage: videos, statistics per channel."""
    halvings = factor.bit_length() - 1
    sizes = {"base_dim": 8, "dim_mult": [1] * (halvings + 1), "temperal_downsample": [False] * halvings}
    return make("AutoencoderKLQwenImage", **{**PER_CHANNEL, **sizes, **config})


def qwen21(**config: Any) -> Any:
    """AutoencoderKLQwenImage21: videos with opacity, 16 pixels a latent as its pipeline has it."""
    return make(
        "AutoencoderKLQwenImage21",
        **{**PER_CHANNEL, "base_dim": 8, "decoder_base_dim": 8, "dim_mult": [1] * 5, **config},
    )


def wan(**config: Any) -> Any:
    """AutoencoderKLWan: videos, statistics per channel, 8 pixels a latent."""
    return make("AutoencoderKLWan", **{**PER_CHANNEL, "base_dim": 8, "dim_mult": [1] * 4, **config})


def dc(factor: int = 4, **config: Any) -> Any:
    """AutoencoderDC: a code without a distribution."""
    blocks = factor.bit_length()
    sizes = {
        f"{side}_{key}": value
        for side in ("encoder", "decoder")
        for key, value in (
            ("block_out_channels", (8,) * blocks),
            ("layers_per_block", (1,) * blocks),
            ("qkv_multiscales", ((),) * blocks),
        )
    }
    return make(
        "AutoencoderDC", **{"latent_channels": 4, "attention_head_dim": 4, **sizes, "scaling_factor": 0.41, **config}
    )


def hunyuan(factor: int = 4, **config: Any) -> Any:
    """AutoencoderKLHunyuanImage: a scale."""
    sizes = {
        "block_out_channels": (32,) * (factor.bit_length()),
        "spatial_compression_ratio": factor,
        "layers_per_block": 1,
    }
    return make(
        "AutoencoderKLHunyuanImage",
        **{
            "in_channels": 3,
            "out_channels": 3,
            "latent_channels": 4,
            "sample_size": 32,
            "scaling_factor": 0.75,
            **sizes,
            **config,
        },
    )


def small(factor: int = 2, **config: Any) -> Any:
    """AutoencoderTiny: neither statistics nor a distribution."""
    blocks = factor.bit_length()
    widths = dict.fromkeys(("encoder_block_out_channels", "decoder_block_out_channels"), (8,) * blocks)
    numbers = dict.fromkeys(("num_encoder_blocks", "num_decoder_blocks"), (1,) * blocks)
    return make("AutoencoderTiny", **widths, **numbers, **{"latent_channels": 4, **config})


def small_flux2() -> Any:
    """AutoencoderTinyFlux2: the same with pooled blocks."""
    widths = dict.fromkeys(("encoder_block_out_channels", "decoder_block_out_channels"), (8, 8))
    numbers = dict.fromkeys(("num_encoder_blocks", "num_decoder_blocks"), (1, 1))
    return make("AutoencoderTinyFlux2", **widths, **numbers, latent_channels=4)
