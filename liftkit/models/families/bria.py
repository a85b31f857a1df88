"""Bria 3.x and FIBO: FLUX.1's blocks on a clock of 1000 sigma, both halves of guidance in one batch.

FIBO's tokens are single latents of a VAE that divides sides by 16. Each of its blocks reads a hidden state of the text encoder
of its own, so that the text of one caption is as many tensors as there are blocks; its masks go by way of the attention's
arguments. Texts are encoded one by one: its encoder pads to the longest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from liftkit.models.flux_like import ADAPTERS, INPUTS, OUTPUTS, to_length, two_by_two, with_ids
from liftkit.models.layout import Layout
from liftkit.models.spec import Architecture, Clock, Config, Grid, encoded, randn, random

BRIA = Architecture(
    name="BriaTransformer2DModel",
    inputs=INPUTS,
    outputs=OUTPUTS,
    layout=Layout.TOKENS,
    latent_patch=two_by_two,
    clock=Clock.THOUSAND_SIGMA,
    conditioning=random(encoder_hidden_states=(7, "joint_attention_dim")),
    arguments=with_ids(),
    pipelines=("BriaPipeline",),
    reference=("norm_out",),
    adapters=ADAPTERS,
    guidance="batch",
    prompts=encoded("encoder_hidden_states", do_classifier_free_guidance=False),
)


def _conditioning(config: Config, batch: int, generator: torch.Generator) -> dict[str, Any]:
    blocks = config["num_layers"] + config["num_single_layers"]
    return {
        "encoder_hidden_states": randn(generator, batch, 7, config["joint_attention_dim"]),
        "text_encoder_layers": randn(generator, batch, blocks, 7, config["text_encoder_dim"]),
        "attention_mask": torch.arange(7).expand(batch, 7) < 5,
    }


def _arguments(grid: Grid, given: Mapping[str, Any]) -> dict[str, Any]:
    arguments = with_ids()(grid, given)
    mask = arguments.pop("attention_mask").bool()
    image = mask.new_ones(grid.batch, grid.rows * grid.columns)
    return {
        **arguments,
        "text_encoder_layers": list(given["text_encoder_layers"].unbind(1)),
        "joint_attention_kwargs": {"attention_mask": torch.cat([mask, image], dim=1)[:, None, None]},
    }


def _prompts(pipeline: Any, texts: list[str], length: int | None) -> dict[str, Tensor]:
    length = length or 512
    network = pipeline.transformer.config
    blocks = network["num_layers"] + network["num_single_layers"]
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for text in texts:
        embeds, _, _, mask, _, layers, _ = pipeline.encode_prompt(
            [text], device=pipeline.device, guidance_scale=0.0, max_sequence_length=length
        )
        # The last blocks read the last hidden states; where there are too few, the last one again.
        layers = [*layers, *layers[-1:] * max(blocks - len(layers), 0)][-blocks:]
        parts = (embeds, mask.bool(), torch.stack(layers, dim=1))
        found.append((to_length(parts[0], length), to_length(parts[1], length), to_length(parts[2], length, axis=2)))
    names = ("encoder_hidden_states", "attention_mask", "text_encoder_layers")
    return {name: torch.cat(each) for name, each in zip(names, zip(*found))}


FIBO = Architecture(
    name="BriaFiboTransformer2DModel",
    inputs=INPUTS,
    outputs=OUTPUTS,
    layout=Layout.TOKENS,
    latent_patch=lambda config: 1,
    clock=Clock.THOUSAND_SIGMA,
    conditioning=_conditioning,
    arguments=_arguments,
    pipelines=("BriaFiboPipeline",),
    reference=("norm_out",),
    adapters=ADAPTERS,
    guidance="batch",
    prompts=_prompts,
)
