"""GLM-Image: the clock counts 1000 sigma - 1, and each token of the image comes with a prior token.

As for CogView4, the scheduler shifts the noise levels and leaves the times. The prior tokens are drawn by an autoregressive
model for a prompt *and* a size, so that captions cannot be encoded by themselves: such models are converted, proved and
sampled, and not finetuned. Reference images of an edit are written into a cache of keys and values at time 0, off the clock,
which the pixel twin refuses.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from liftkit.errors import UsageError
from liftkit.models.conditioning import random
from liftkit.models.families.cogview4 import ADAPTERS, PIXELS, unshifted
from liftkit.models.layout import Layout
from liftkit.models.spec import Architecture, Clock, Grid, Projection


def _arguments(grid: Grid, given: Mapping[str, Any]) -> dict[str, Any]:
    size = torch.tensor([[grid.rows, grid.columns]], device=grid.device).float().expand(grid.batch, 2) * PIXELS
    prior = torch.zeros(grid.batch, grid.rows * grid.columns, dtype=torch.long, device=grid.device)
    dropped = {"prior_token_id": prior, "prior_token_drop": torch.ones_like(prior, dtype=torch.bool)}
    return {"target_size": size, "crop_coords": torch.zeros_like(size), **dropped, **given}


def _no_references(arguments: Mapping[str, Any]) -> None:
    caches = arguments.get("kv_caches")
    if caches is not None and caches[0].mode == "write":
        raise UsageError(
            "the pixel twin of GLM-Image takes no reference images: they are given at time 0, which its clock of "
            "1000 sigma - 1 does not have; leave image out"
        )


def _prompts(pipeline: Any, prompts: list[str], length: int | None) -> dict[str, Tensor]:
    raise UsageError(
        "GLM-Image cannot be finetuned on captions: each image needs prior tokens that its autoregressive model draws for the "
        "caption and the size together; convert, verify and sample work"
    )


GLM_IMAGE = Architecture(
    name="GlmImageTransformer2DModel",
    inputs=(Projection("image_projector.proj", "cpq"),),
    outputs=(Projection("proj_out", "cpq"),),
    layout=Layout.IMAGE,
    clock=Clock.THOUSAND_SIGMA_LESS_ONE,
    network_time=unshifted,
    conditioning=random(encoder_hidden_states=(7, "text_embed_dim")),
    arguments=_arguments,
    clean_tokens=_no_references,
    reference=("norm_out",),
    adapters=ADAPTERS,
    encoders=("text_encoder", "tokenizer", "vision_language_encoder", "processor"),
    prompts=_prompts,
)
