"""Bria FIBO 2: images patchified in the transformer, pictures to edit as clean latents beside the noisy ones.

The text is one bundle of hidden states for each block that reads it. Its length decides how many tokens the text is condensed
to, so that masks are part of what the network reads. Texts are encoded one by one: its processor pads to the longest.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from liftkit.models.conditioning import randn
from liftkit.models.flux_like import to_length
from liftkit.models.layout import Layout
from liftkit.models.spec import Architecture, Config, Projection


def _conditioning(config: Config, batch: int, generator: torch.Generator) -> dict[str, Any]:
    bundles = 1 + len(config["injection_layer_ids"])
    return {
        "encoder_hidden_states": randn(generator, batch, bundles, 7, config["cap_feat_dim"]),
        "encoder_attention_mask": torch.ones(batch, 7, dtype=torch.bool),
    }


def _prompts(pipeline: Any, texts: list[str], length: int | None) -> dict[str, Tensor]:
    length = length or 512
    embeds, masks = [], []
    for text in texts:
        found, mask = pipeline.encode_prompt([text], device=pipeline._execution_device)
        mask = (
            torch.ones(found.shape[0], found.shape[2], dtype=torch.bool, device=found.device) if mask is None else mask
        )
        embeds.append(to_length(found, length, axis=2))
        masks.append(to_length(mask, length))
    return {"encoder_hidden_states": torch.cat(embeds), "encoder_attention_mask": torch.cat(masks)}


FIBO2 = Architecture(
    name="BriaFibo2Transformer2DModel",
    inputs=(Projection("x_embedder", "cpq"),),
    outputs=(Projection("final_layer.linear", "cpq"),),
    layout=Layout.IMAGE,
    channel_keys=("in_channels",),
    conditioning=_conditioning,
    clean_inputs=("context_latents",),
    reference=("final_layer.adaLN_modulation.1",),
    adapters=(
        "layers.*.feed_forward.w1",
        "layers.*.feed_forward.w2",
        "layers.*.feed_forward.w3",
        "layers.*.attention.to_out.0",
    ),
    encoders=("text_encoder", "processor"),
    prompts=_prompts,
)
