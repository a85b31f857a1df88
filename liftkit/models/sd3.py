"""Stable Diffusion 3 and 3.5: a convolution cuts the patches, biases, other order out than in, 1000 sigma clock."""

from __future__ import annotations

from typing import Any

import torch

from liftkit.models.spec import Architecture, Clock, Config, Projection, randn


def _conditioning(config: Config, batch: int, generator: torch.Generator) -> dict[str, Any]:
    return {
        "encoder_hidden_states": randn(generator, batch, 7, config["joint_attention_dim"]),
        "pooled_projections": randn(generator, batch, config["pooled_projection_dim"]),
    }


SD3 = Architecture(
    name="SD3Transformer2DModel",
    inputs=(Projection("pos_embed.proj", "cpq"),),
    outputs=(Projection("proj_out", "pqc"),),
    layout="image",
    latent_patch=lambda config: config["patch_size"],
    conditioning=_conditioning,
    clock=Clock.THOUSAND_SIGMA,
    reference=("norm_out",),
)
