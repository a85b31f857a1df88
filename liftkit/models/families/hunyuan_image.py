"""HunyuanImage 2.1: single elements of a 32-fold VAE (a token is 32 x 32 pixels, 64 of 3072), a second text encoder for the words
that an image shows, guidance by a guider component. The distilled model maps over an interval of time and cannot be lifted.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from liftkit.models.conditioning import random
from liftkit.models.layout import Layout
from liftkit.models.spec import Architecture, Clock, Config, Projection


def _refuse(config: Config) -> str | None:
    if config.get("use_meanflow"):
        return (
            "distilled (use_meanflow): it predicts the mean velocity over an interval, of which the velocity outside of the "
            "subspace does not follow; convert the undistilled model"
        )
    return None


def _conditioning(config: Config, batch: int, generator: torch.Generator) -> dict[str, Any]:
    shapes: dict[str, tuple[int | str, ...]] = {
        "encoder_hidden_states": (7, "text_embed_dim"),
        "encoder_attention_mask": (7,),
    }
    drawn = random(**shapes)(config, batch, generator)
    if config.get("text_embed_2_dim") is not None:
        drawn |= random(encoder_hidden_states_2=(5, "text_embed_2_dim"))(config, batch, generator)
        drawn["encoder_attention_mask_2"] = torch.ones(batch, 5, dtype=torch.bool)
    return drawn


def _prompts(pipeline: Any, prompts: list[str], length: int | None) -> dict[str, Tensor]:
    text, mask, glyphs, glyphs_mask = pipeline.encode_prompt(
        prompts, device=pipeline._execution_device, batch_size=len(prompts)
    )
    return {
        "encoder_hidden_states": text,
        "encoder_attention_mask": mask,
        "encoder_hidden_states_2": glyphs,
        "encoder_attention_mask_2": glyphs_mask,
    }


HUNYUAN_IMAGE = Architecture(
    name="HunyuanImageTransformer2DModel",
    inputs=(Projection("x_embedder.proj", "cpq"),),
    outputs=(Projection("proj_out", "cpq"),),
    layout=Layout.IMAGE,
    clock=Clock.THOUSAND_SIGMA,
    conditioning=_conditioning,
    refuse=_refuse,
    reference=("norm_out",),
    adapters=(
        "transformer_blocks.*.ff.net.0.proj",
        "transformer_blocks.*.ff.net.2",
        "transformer_blocks.*.attn.to_out.0",
        "single_transformer_blocks.*.proj_out",
    ),
    encoders=("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
    prompts=_prompts,
)
