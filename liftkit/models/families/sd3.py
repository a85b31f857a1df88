"""Stable Diffusion 3 and 3.5: a convolution cuts the patches, biases, other order out than in, 1000 sigma clock."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from liftkit.models.conditioning import randn
from liftkit.models.layout import Layout
from liftkit.models.spec import Architecture, Clock, Config, Projection


def _conditioning(config: Config, batch: int, generator: torch.Generator) -> dict[str, Any]:
    return {
        "encoder_hidden_states": randn(generator, batch, 7, config["joint_attention_dim"]),
        "pooled_projections": randn(generator, batch, config["pooled_projection_dim"]),
    }


def _prompts(pipeline: Any, prompts: list[str], length: int | None) -> dict[str, Tensor]:
    more = {} if length is None else {"max_sequence_length": length}
    embeds, _, pooled, _ = pipeline.encode_prompt(
        prompts, None, None, device=pipeline._execution_device, do_classifier_free_guidance=False, **more
    )
    return {"encoder_hidden_states": embeds, "pooled_projections": pooled}


_BLOCK, _IMAGE, _TEXT = "transformer_blocks.*", "joint_blocks.*.x_block", "joint_blocks.*.context_block"
ORIGINAL = {
    "x_embedder.proj": ("pos_embed.proj",),
    "context_embedder": ("context_embedder",),
    **{
        f"{theirs}_embedder.mlp.{place}": (f"time_text_embed.{ours}_embedder.linear_{number}",)
        for theirs, ours in (("t", "timestep"), ("y", "text"))
        for place, number in ((0, 1), (2, 2))
    },
    f"{_IMAGE}.adaLN_modulation.1": (f"{_BLOCK}.norm1.linear",),
    f"{_TEXT}.adaLN_modulation.1": (f"{_BLOCK}.norm1_context.linear",),
    f"{_IMAGE}.attn.qkv": tuple(f"{_BLOCK}.attn.to_{each}" for each in "qkv"),
    f"{_TEXT}.attn.qkv": tuple(f"{_BLOCK}.attn.add_{each}_proj" for each in "qkv"),
    f"{_IMAGE}.attn.proj": (f"{_BLOCK}.attn.to_out.0",),
    f"{_TEXT}.attn.proj": (f"{_BLOCK}.attn.to_add_out",),
    # Of SD3.5 medium.
    f"{_IMAGE}.attn2.qkv": tuple(f"{_BLOCK}.attn2.to_{each}" for each in "qkv"),
    f"{_IMAGE}.attn2.proj": (f"{_BLOCK}.attn2.to_out.0",),
    **{
        f"{theirs}.mlp.fc{number}": (f"{_BLOCK}.{ours}.net.{place}",)
        for theirs, ours in ((_IMAGE, "ff"), (_TEXT, "ff_context"))
        for number, place in ((1, "0.proj"), (2, "2"))
    },
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    "final_layer.linear": ("proj_out",),
}

SD3 = Architecture(
    name="SD3Transformer2DModel",
    inputs=(Projection("pos_embed.proj", "cpq"),),
    outputs=(Projection("proj_out", "pqc"),),
    layout=Layout.IMAGE,
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
    original=ORIGINAL,
    # T5, the third, may be left out.
    encoders=("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
    prompts=_prompts,
)
