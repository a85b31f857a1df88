"""Lumina-Image 2: its output projection is inside of the last norm; time runs from 0 to 1 and is not scaled.

The output is x_0 - eps. Pipelines rescale the guided velocity to the norm of the conditional one along rows of the latents
(``cfg_normalization``), and take the number of *channels* where they mean to take the number of tokens for a dynamic shift:
converted models need a scheduler with a static shift, as the released one has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from liftkit.models.conditioning import encoded, random
from liftkit.models.layout import Layout
from liftkit.models.spec import Architecture, Clock, Projection


def _rescale(guided: Tensor, conditional: Tensor, call: Mapping[str, Any]) -> Tensor:
    """To the norm of the conditional velocity (B, C, h, w), row by row."""
    if not call.get("cfg_normalization", True):
        return guided
    return guided * (conditional.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))


def _original() -> dict[str, tuple[str, ...]]:
    embedder = "time_caption_embed"
    names: dict[str, tuple[str, ...]] = {
        "cap_embedder.1": (f"{embedder}.caption_embedder.1",),
        "t_embedder.mlp.0": (f"{embedder}.timestep_embedder.linear_1",),
        "t_embedder.mlp.2": (f"{embedder}.timestep_embedder.linear_2",),
        "final_layer.adaLN_modulation.1": ("norm_out.linear_1",),
        "final_layer.linear": ("norm_out.linear_2",),
    }
    for blocks in ("layers.*", "noise_refiner.*", "context_refiner.*"):
        names[f"{blocks}.attention.qkv"] = tuple(f"{blocks}.attn.to_{part}" for part in "qkv")
        names[f"{blocks}.attention.out"] = (f"{blocks}.attn.to_out.0",)
        names[f"{blocks}.adaLN_modulation.1"] = (f"{blocks}.norm1.linear",)
        names |= {f"{blocks}.feed_forward.w{n}": (f"{blocks}.feed_forward.linear_{n}",) for n in (1, 2, 3)}
    return names


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
    original=_original(),
    prompts=encoded("encoder_hidden_states", "encoder_attention_mask", do_classifier_free_guidance=False),
)
