"""CogView4 and its control variant: the scheduler shifts the noise levels and leaves the times as they were.

The pipelines pass timesteps *and* sigmas to a scheduler, which shifts the sigmas alone by ``mu``: the network is given the
noise level before the shift (``network_time``). Sizes in pixels are conditioning. CogView4-Control appends the latents of a
control image to the channels.

The text of a batch is padded to its longest and the padding attended to; the stock class takes a mask, but adds its ones and
zeros to the logits. Captions are therefore all padded to one length.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from liftkit.models.conditioning import random
from liftkit.models.layout import Layout
from liftkit.models.spec import LIFTED, Architecture, Blocks, Clock, Grid, Projection

PIXELS = 16
"""Side of a token in the pixels of the released models, whose sizes the networks are conditioned on."""
ADAPTERS = (
    "transformer_blocks.*.ff.net.0.proj",
    "transformer_blocks.*.ff.net.2",
    "transformer_blocks.*.attn1.to_out.0",
)


def unshifted(tau: Tensor, tokens: int) -> Tensor:
    """The inverse of the scheduler's linear shift by ``mu``."""
    mu = (tokens / 256) ** 0.5 * 0.75 + 0.25
    return tau / (mu + (1.0 - mu) * tau)


def _sizes(grid: Grid, given: Mapping[str, Any]) -> dict[str, Any]:
    size = torch.tensor([[grid.rows, grid.columns]], device=grid.device).float().expand(grid.batch, 2) * PIXELS
    return {"original_size": size, "target_size": size, "crop_coords": torch.zeros_like(size), **given}


def _control(channels: int, lifted: int) -> Blocks:
    """Channels of a control variant: the noisy latents, and those of the control image."""
    return (LIFTED, LIFTED) if channels == 2 * lifted else (LIFTED,)


def _prompts(pipeline: Any, prompts: list[str], length: int | None) -> dict[str, Tensor]:
    # The last text is longer than allowed, so that all are padded to the length allowed, whatever else is in the batch.
    length = length or 224
    embeds, _ = pipeline.encode_prompt(
        [*prompts, "a " * length],
        do_classifier_free_guidance=False,
        device=pipeline._execution_device,
        max_sequence_length=length,
    )
    return {"encoder_hidden_states": embeds[:-1]}


COGVIEW4 = Architecture(
    name="CogView4Transformer2DModel",
    inputs=(Projection("patch_embed.proj", "cpq", _control),),
    outputs=(Projection("proj_out", "cpq"),),
    layout=Layout.IMAGE,
    clock=Clock.THOUSAND_SIGMA,
    network_time=unshifted,
    channel_keys=("out_channels", "in_channels"),
    conditioning=random(encoder_hidden_states=(16, "text_embed_dim")),
    arguments=_sizes,
    reference=("norm_out",),
    adapters=ADAPTERS,
    prompts=_prompts,
)
