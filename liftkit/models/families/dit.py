"""DiT read as SiT: a flow of class labels, where the class is that of DiT.

diffusers has no pipeline for SiT, and its DiTPipeline predicts noise, which conversions refuse by the scheduler. What is proved
is the transformer alone. Some configs have a learned variance beside the output: its half of the channels is lifted
like the other and means nothing. The grid has to be square. Time runs from 0 to 1, unscaled; the output is x_0 - eps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from liftkit.errors import UsageError
from liftkit.models.layout import Layout
from liftkit.models.spec import LIFTED, Architecture, Blocks, Clock, Config, Projection


def _with_variance(channels: int, lifted: int) -> Blocks:
    return (LIFTED,) * (channels // lifted)


def _conditioning(config: Config, batch: int, generator: torch.Generator) -> dict[str, Any]:
    return {"class_labels": torch.randint(0, config["num_embeds_ada_norm"], (batch,), generator=generator)}


def _prompts(pipeline: Any, prompts: list[str], length: int | None) -> dict[str, Tensor]:
    raise UsageError("DiTTransformer2DModel is conditioned on class labels; it cannot be finetuned on captions")


DIT = Architecture(
    name="DiTTransformer2DModel",
    inputs=(Projection("pos_embed.proj", "cpq"),),
    outputs=(Projection("proj_out_2", "pqc", _with_variance),),
    layout=Layout.IMAGE,
    proof_grid=(4, 4),
    clock=Clock.ONE_MINUS_SIGMA,
    sign=-1,
    conditioning=_conditioning,
    reference=("proj_out_1",),
    adapters=(
        "transformer_blocks.*.ff.net.0.proj",
        "transformer_blocks.*.ff.net.2",
        "transformer_blocks.*.attn1.to_out.0",
    ),
    labels=lambda config, labels: {"class_labels": labels},
    encoders=(),
    prompts=_prompts,
)
