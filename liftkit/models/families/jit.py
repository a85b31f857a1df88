"""JiT: conditioned on a class, made of pixels from the start. It is not converted but made from nothing (``liftkit init``), and its
Asym twin has any rank: 0 is JiT itself, D plain velocity prediction.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from liftkit.errors import UsageError
from liftkit.models.layout import Layout
from liftkit.models.spec import Architecture, Config, Projection


def _conditioning(config: Config, batch: int, generator: torch.Generator) -> dict[str, Any]:
    return {"class_labels": torch.randint(0, config["num_classes"], (batch,), generator=generator)}


def _prompts(pipeline: Any, prompts: list[str], length: int | None) -> dict[str, Tensor]:
    raise UsageError(
        "JiTTransformer2DModel is conditioned on class labels: its folder needs the pipeline of `liftkit init`"
    )


JIT = Architecture(
    name="JiTTransformer2DModel",
    inputs=(Projection("patch_embed.proj", "cpq"),),
    outputs=(Projection("proj_out", "pqc"),),
    layout=Layout.IMAGE,
    channel_keys=("in_channels",),
    conditioning=_conditioning,
    labels=lambda config, labels: {"class_labels": labels},
    reference=("norm_out.linear",),
    adapters=(
        "transformer_blocks.*.ff.linear_in",
        "transformer_blocks.*.ff.linear_out",
        "transformer_blocks.*.attn.to_out.0",
    ),
    guidance="batch",
    encoders=(),
    prompts=_prompts,
)
