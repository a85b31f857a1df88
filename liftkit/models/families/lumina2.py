"""Lumina-Image 2: its output projection is inside of the last norm; time runs from 0 to 1 and is not scaled.

The output is x_0 - eps. Pipelines rescale the guided velocity to the norm of the conditional one along rows of the latents
(``cfg_normalization``), and take the number of *channels* where they mean to take the number of tokens for a dynamic shift:
converted models need a scheduler with a static shift, as the released one has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from liftkit.models.layout import Layout
from liftkit.models.spec import Architecture, Clock, Projection, encoded, random


def _rescale(guided: Tensor, conditional: Tensor, call: Mapping[str, Any]) -> Tensor:
    """To the norm of the conditional velocity (B, C, h, w), row by row."""
    if not call.get("cfg_normalization", True):
        return guided
    return guided * (conditional.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))


LUMINA2 = Architecture(
    name="Lumina2Transformer2DModel",
    inputs=(Projection("x_embedder", "pqc"),),
    outputs=(Projection("norm_out.linear_2", "pqc"),),
    layout=Layout.IMAGE,
    clock=Clock.ONE_MINUS_SIGMA,
    sign=-1,
    conditioning=random(encoder_hidden_states=(7, "cap_feat_dim"), encoder_attention_mask=(7,)),
    reference=("norm_out.linear_1",),
    adapters=(
        "layers.*.feed_forward.linear_1",
        "layers.*.feed_forward.linear_2",
        "layers.*.feed_forward.linear_3",
        "layers.*.attn.to_out.0",
    ),
    rescale=_rescale,
    prompts=encoded("encoder_hidden_states", "encoder_attention_mask", do_classifier_free_guidance=False),
)
