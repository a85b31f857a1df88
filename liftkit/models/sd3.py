"""Stable Diffusion 3 and 3.5: a convolution cuts the patches, biases, other order out than in, 1000 sigma clock."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from liftkit.models.spec import Architecture, Clock, Config, Projection, randn


def _conditioning(config: Config, batch: int, generator: torch.Generator) -> dict[str, Any]:
    return {
        "encoder_hidden_states": randn(generator, batch, 7, config["joint_attention_dim"]),
        "pooled_projections": randn(generator, batch, config["pooled_projection_dim"]),
    }


def _prompts(pipeline: Any, prompts: list[str], length: int | None) -> dict[str, Tensor]:
    more = {} if length is None else {"max_sequence_length": length}
    embeds, _, pooled, _ = pipeline.encode_prompt(
        prompts, None, None, device=pipeline.device, do_classifier_free_guidance=False, **more
    )
    return {"encoder_hidden_states": embeds, "pooled_projections": pooled}


SD3 = Architecture(
    name="SD3Transformer2DModel",
    inputs=(Projection("pos_embed.proj", "cpq"),),
    outputs=(Projection("proj_out", "pqc"),),
    layout="image",
    latent_patch=lambda config: config["patch_size"],
    conditioning=_conditioning,
    clock=Clock.THOUSAND_SIGMA,
    reference=("norm_out",),
    adapters=(
        "transformer_blocks.*.ff.net.0.proj",
        "transformer_blocks.*.ff.net.2",
        "transformer_blocks.*.ff_context.net.0.proj",
        "transformer_blocks.*.ff_context.net.2",
        "time_text_embed.timestep_embedder.linear_1",
        "time_text_embed.timestep_embedder.linear_2",
        "transformer_blocks.*.attn.to_out.0",
    ),
    guidance="batch",
    prompts=_prompts,
)
