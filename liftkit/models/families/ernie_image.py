"""ERNIE-Image: the pipeline packs 2 x 2 latents into the channels of an image of tokens; FLUX.2's VAE, but its batch norm has an
eps of the pipeline's own. Prompts are rows with their lengths.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from liftkit.models.conditioning import padded, random, trimmed
from liftkit.models.layout import Layout
from liftkit.models.spec import Architecture, Clock, Grid, Projection
from liftkit.models.vaes import BatchNorm

LENGTH = 512
"""Tokens of a prompt where the model's folder names no other number; the pipeline itself knows no limit."""


def _arguments(grid: Grid, given: Mapping[str, Any]) -> dict[str, Any]:
    text, mask = trimmed(given["text"], given["text_mask"])
    return {"text_bth": text, "text_lens": mask.sum(1)}


def _prompts(pipeline: Any, prompts: list[str], length: int | None) -> dict[str, Tensor]:
    text, mask = padded(pipeline.encode_prompt(prompts, pipeline._execution_device), length or LENGTH)
    return {"text": text, "text_mask": mask}


ERNIE_IMAGE = Architecture(
    name="ErnieImageTransformer2DModel",
    inputs=(Projection("x_embedder.proj", "cpq"),),
    outputs=(Projection("final_linear", "cpq"),),
    layout=Layout.IMAGE,
    latent_patch=lambda config: 2,
    token_patch=lambda config: 1,
    clock=Clock.THOUSAND_SIGMA,
    conditioning=random(text=(7, "text_in_dim"), text_mask=(7,)),
    arguments=_arguments,
    pipeline_latents=lambda state: F.pixel_unshuffle(state, 2),
    latent_statistics=BatchNorm(eps=1e-5),
    reference=("final_norm",),
    adapters=("layers.*.mlp.up_proj", "layers.*.mlp.linear_fc2", "layers.*.self_attention.to_out.0"),
    guidance="batch",
    prompts=_prompts,
)
