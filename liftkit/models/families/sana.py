"""Sana: linear attention on the 32-fold compression of DC-AE, so that a token is 32 x 32 pixels and the rank gap is wide (32 of
3072); a convolution cuts patches, other order out than in. Prompts stand behind the pipeline's own long instruction.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor

from liftkit.models.conditioning import encoded, random
from liftkit.models.layout import Layout
from liftkit.models.spec import Architecture, Clock, Config, Projection


def _refuse(config: Config) -> str | None:
    if config.get("timestep_scale", 1.0) != 1.0 or config.get("guidance_embeds"):
        return (
            "a Sana-Sprint: distilled to a few steps of another flow (TrigFlow); convert the Sana that it was made from"
        )
    return None


def _prompts(pipeline: Any, prompts: list[str], length: int | None) -> dict[str, Tensor]:
    instruction = inspect.signature(type(pipeline).__call__).parameters["complex_human_instruction"].default
    read = encoded(
        "encoder_hidden_states",
        "encoder_attention_mask",
        do_classifier_free_guidance=False,
        complex_human_instruction=instruction,
    )
    return read(pipeline, prompts, length)


SANA = Architecture(
    name="SanaTransformer2DModel",
    inputs=(Projection("patch_embed.proj", "cpq"),),
    outputs=(Projection("proj_out", "pqc"),),
    layout=Layout.IMAGE,
    clock=Clock.THOUSAND_SIGMA,
    conditioning=random(encoder_hidden_states=(7, "caption_channels"), encoder_attention_mask=(7,)),
    refuse=_refuse,
    # It would render at the nearest trained size, and crop.
    call={"use_resolution_binning": False},
    adapters=("transformer_blocks.*.attn1.to_out.0", "transformer_blocks.*.attn2.to_out.0"),
    guidance="batch",
    prompts=_prompts,
)
