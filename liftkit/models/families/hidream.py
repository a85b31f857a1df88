"""HiDream-I1: llama states of all layers with the batch second, an argument ``timesteps``, and an output x_0 - eps.

In training its output has another shape unless the config says ``force_inference_output``, which conversions set. Grids that
are not square are padded to ``max_resolution``. Its pipelines shift by the model's largest number of tokens, not the image's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from liftkit.models.conditioning import randn
from liftkit.models.layout import Layout
from liftkit.models.spec import Architecture, Clock, Config, Grid, Projection


def _conditioning(config: Config, batch: int, generator: torch.Generator) -> dict[str, Any]:
    layers = max(config["llama_layers"]) + 1
    return {
        "encoder_hidden_states_t5": randn(generator, batch, 7, config["caption_channels"][0]),
        "encoder_hidden_states_llama3": randn(generator, batch, layers, 7, config["caption_channels"][1]),
        "pooled_embeds": randn(generator, batch, config["text_emb_dim"]),
    }


def _layers_first(grid: Grid, given: Mapping[str, Any]) -> dict[str, Any]:
    return {**given, "encoder_hidden_states_llama3": given["encoder_hidden_states_llama3"].transpose(0, 1)}


def _prompts(pipeline: Any, prompts: list[str], length: int | None) -> dict[str, Tensor]:
    more = {} if length is None else {"max_sequence_length": length}
    t5, _, llama, _, pooled, _ = pipeline.encode_prompt(
        prompts, device=pipeline._execution_device, do_classifier_free_guidance=False, **more
    )
    return {
        "encoder_hidden_states_t5": t5,
        "encoder_hidden_states_llama3": llama.transpose(0, 1).contiguous(),
        "pooled_embeds": pooled,
    }


HIDREAM = Architecture(
    name="HiDreamImageTransformer2DModel",
    inputs=(Projection("x_embedder.proj", "pqc"),),
    outputs=(Projection("final_layer.linear", "pqc"),),
    layout=Layout.IMAGE,
    time="timesteps",
    clock=Clock.THOUSAND_SIGMA,
    sign=-1,
    conditioning=_conditioning,
    arguments=_layers_first,
    config=lambda config: {"force_inference_output": True},
    reference=("final_layer.adaLN_modulation.1",),
    adapters=("*_stream_blocks.*.attn1.to_out", "double_stream_blocks.*.attn1.to_out_t"),
    guidance="batch",
    encoders=tuple(f"{each}{number}" for number in ("", "_2", "_3", "_4") for each in ("text_encoder", "tokenizer")),
    prompts=_prompts,
)
