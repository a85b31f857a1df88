"""LongCat-Image: FLUX.1's blocks, image tokens in a plane of their own that starts where a text of 512 tokens would end.

Its pipeline draws noise of 16 channels whatever the transformer has, so that a pixel model has to be given its ``latents``
(``liftkit sample`` does so); it cannot take ready prompt embeddings, and its guidance shrinks tokens that grew by it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from liftkit.errors import UsageError
from liftkit.models.conditioning import random
from liftkit.models.flux_like import ADAPTERS, INPUTS, OUTPUTS, two_by_two, with_ids
from liftkit.models.layout import Layout
from liftkit.models.spec import Architecture

TEXT = 512
"""Tokens that every text is padded to; images are placed behind them."""


def _prompts(pipeline: Any, texts: list[str], length: int | None) -> dict[str, Tensor]:
    if length not in (None, TEXT):
        raise UsageError(f"a text length of {length} tokens: LongCat-Image reads texts in {TEXT}; leave the length out")
    return {"encoder_hidden_states": pipeline.encode_prompt(texts)[0]}


def _rescale(guided: Tensor, conditional: Tensor, call: Mapping[str, Any]) -> Tensor:
    if not call.get("enable_cfg_renorm", True):
        return guided
    ratio = conditional.norm(dim=-1, keepdim=True) / (guided.norm(dim=-1, keepdim=True) + 1e-8)
    return guided * ratio.clamp(call.get("cfg_renorm_min", 0.0), 1.0)


LONGCAT = Architecture(
    name="LongCatImageTransformer2DModel",
    inputs=INPUTS,
    outputs=OUTPUTS,
    layout=Layout.TOKENS,
    channel_keys=("in_channels",),
    latent_patch=two_by_two,
    conditioning=random(encoder_hidden_states=(7, "joint_attention_dim")),
    arguments=with_ids(counted=True, plane=1, origin=TEXT),
    rescale=_rescale,
    reference=("norm_out",),
    adapters=ADAPTERS,
    encoders=("text_encoder", "tokenizer", "text_processor"),
    prompts=_prompts,
)
