"""Wan as text-to-image: a video model asked for one frame. Three-dimensional patches and states, a VAE of videos, prompts
padded with zeros that are attended to.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from liftkit.models.conditioning import encoded, random
from liftkit.models.layout import Layout
from liftkit.models.spec import Architecture, Clock, Config, Projection

LENGTH = 512
"""Tokens of a prompt in the pipeline's call; its ``encode_prompt`` alone would take 226."""


def _refuse(config: Config) -> str | None:
    if config.get("image_dim") is not None or config["in_channels"] != config["out_channels"]:
        return "an image-to-video Wan: its input carries an image's latents and a mask; convert a text-to-video one"
    return None


def _prompts(pipeline: Any, prompts: list[str], length: int | None) -> dict[str, Tensor]:
    return encoded("encoder_hidden_states", do_classifier_free_guidance=False)(pipeline, prompts, length or LENGTH)


def _original() -> dict[str, tuple[str, ...]]:
    embedder = "condition_embedder"
    names: dict[str, tuple[str, ...]] = {
        "time_projection.1": (f"{embedder}.time_proj",),
        "head.head": ("proj_out",),
        "blocks.*.ffn.0": ("blocks.*.ffn.net.0.proj",),
        "blocks.*.ffn.2": ("blocks.*.ffn.net.2",),
    }
    for kind in ("time", "text"):
        names |= {f"{kind}_embedding.{2 * n}": (f"{embedder}.{kind}_embedder.linear_{n + 1}",) for n in (0, 1)}
    for theirs, ours in (("self_attn", "attn1"), ("cross_attn", "attn2")):
        names |= {f"blocks.*.{theirs}.{part}": (f"blocks.*.{ours}.to_{part}",) for part in "qkv"}
        names |= {f"blocks.*.{theirs}.o": (f"blocks.*.{ours}.to_out.0",)}
    return names


WAN = Architecture(
    name="WanTransformer3DModel",
    inputs=(Projection("patch_embedding", "cpq"),),
    outputs=(Projection("proj_out", "pqc"),),
    layout=Layout.VIDEO,
    clock=Clock.THOUSAND_SIGMA,
    conditioning=random(encoder_hidden_states=(7, "text_dim")),
    refuse=_refuse,
    call={"num_frames": 1},
    adapters=("blocks.*.ffn.net.0.proj", "blocks.*.ffn.net.2", "blocks.*.attn1.to_out.0"),
    original=_original(),
    prompts=_prompts,
)
