"""Bria 3.x and FIBO: FLUX.1's blocks on a clock of 1000 sigma, both halves of guidance in one batch.

FIBO's tokens are single latents of a VAE that divides sides by 16. Each of its blocks reads a hidden state of the text encoder
of its own; its masks go by way of the attention's arguments. Texts are encoded one by one: its encoder pads to the longest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from liftkit.models.conditioning import encoded, randn, random
from liftkit.models.flux_like import ADAPTERS, INPUTS, OUTPUTS, to_length, two_by_two, with_ids
from liftkit.models.layout import Layout
from liftkit.models.spec import Architecture, Clock, Config, Grid

BRIA = Architecture(
    name="BriaTransformer2DModel",
    inputs=INPUTS,
    outputs=OUTPUTS,
    layout=Layout.TOKENS,
    channel_keys=("in_channels",),
    latent_patch=two_by_two,
    clock=Clock.THOUSAND_SIGMA,
    conditioning=random(encoder_hidden_states=(7, "joint_attention_dim")),
    arguments=with_ids(),
    reference=("norm_out",),
    adapters=ADAPTERS,
    guidance="batch",
    prompts=encoded("encoder_hidden_states", do_classifier_free_guidance=False),
)


def _arguments(grid: Grid, given: Mapping[str, Any]) -> dict[str, Any]:
    """A hidden state for each block, the last ones for the last blocks; where there are too few, the last one again."""
    arguments = with_ids()(grid, given)
    mask = arguments.pop("attention_mask").bool()
    image = mask.new_ones(grid.batch, grid.rows * grid.columns)
    layers, blocks = list(given["text_encoder_layers"].unbind(1)), _blocks(grid.config)
    return {
        **arguments,
        "text_encoder_layers": [*layers, *layers[-1:] * max(blocks - len(layers), 0)][-blocks:],
        "joint_attention_kwargs": {"attention_mask": torch.cat([mask, image], dim=1)[:, None, None]},
    }


def _blocks(config: Config) -> int:
    return int(config["num_layers"] + config["num_single_layers"])


def _conditioning(config: Config, batch: int, generator: torch.Generator) -> dict[str, Any]:
    return {
        "encoder_hidden_states": randn(generator, batch, 7, config["joint_attention_dim"]),
        "text_encoder_layers": randn(generator, batch, _blocks(config), 7, config["text_encoder_dim"]),
        "attention_mask": torch.arange(7).expand(batch, 7) < 5,
    }


def _prompts(pipeline: Any, texts: list[str], length: int | None) -> dict[str, Tensor]:
    """Not by ``encode_prompt``, which asks for the transformer, but by the method that this calls."""
    length = length or 512
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for text in texts:
        embeds, layers, mask = pipeline.get_prompt_embeds(
            [text], max_sequence_length=length, device=pipeline._execution_device
        )
        states = to_length(torch.stack(layers, dim=1).to(embeds.dtype), length, axis=2)
        found.append((to_length(embeds, length), to_length(mask.bool(), length), states))
    names = ("encoder_hidden_states", "attention_mask", "text_encoder_layers")
    return {name: torch.cat(each) for name, each in zip(names, zip(*found))}


FIBO = Architecture(
    name="BriaFiboTransformer2DModel",
    inputs=INPUTS,
    outputs=OUTPUTS,
    layout=Layout.TOKENS,
    channel_keys=("in_channels",),
    latent_patch=lambda config: 1,
    clock=Clock.THOUSAND_SIGMA,
    conditioning=_conditioning,
    arguments=_arguments,
    reference=("norm_out",),
    adapters=ADAPTERS,
    guidance="batch",
    prompts=_prompts,
)
