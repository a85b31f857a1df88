"""FLUX.2 (dev, klein 4B and 9B): tokens packed by the pipeline, no biases, sigma clock, reference tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from liftkit.models.conditioning import one_hot, randn
from liftkit.models.flux_like import behind
from liftkit.models.layout import Layout
from liftkit.models.spec import Architecture, Config, Grid, Projection


def _arguments(grid: Grid, given: Mapping[str, Any]) -> dict[str, Any]:
    """Ids (t, h, w, l): image tokens count rows and columns, text tokens their place in the sequence."""
    # Made on the device: copying them there would have the processor wait for it at every step.
    image, text = (
        torch.cartesian_prod(*(torch.arange(n, device=grid.device) for n in counts))
        for counts in ((1, grid.rows, grid.columns, 1), (1, 1, 1, given["encoder_hidden_states"].shape[1]))
    )
    return {"img_ids": image.expand(grid.batch, -1, -1), "txt_ids": text.expand(grid.batch, -1, -1), **given}


def _reference_tokens(arguments: Mapping[str, Any]) -> Tensor | None:
    """Reference images sit at t >= 10; the tokens being denoised at t = 0."""
    ids = arguments.get("img_ids")
    return None if ids is None else ids[..., 0] != 0


def _reference_ids(ids: Tensor, number: int) -> Tensor:
    """Those of the tokens, at the time of a reference's number."""
    return torch.cat([torch.full_like(ids[..., :1], 10 * number), ids[..., 1:]], -1)


def _conditioning(config: Config, batch: int, generator: torch.Generator) -> dict[str, Any]:
    result: dict[str, Any] = {"encoder_hidden_states": randn(generator, batch, 7, config["joint_attention_dim"])}
    if config.get("guidance_embeds"):
        result["guidance"] = torch.full((batch,), 4.0)
    return result


def _prompts(pipeline: Any, prompts: list[str], length: int | None) -> dict[str, Tensor]:
    more = {} if length is None else {"max_sequence_length": length}
    embeds, _ = pipeline.encode_prompt(prompts, device=pipeline._execution_device, **more)
    return {"encoder_hidden_states": embeds}


def _both_streams(ours: str, theirs: str) -> dict[str, tuple[str, ...]]:
    """Matrices of a double block, of images and of text."""
    block, part = "transformer_blocks.*", "double_blocks.*"
    return {
        f"{part}.{theirs}_attn.qkv": tuple(f"{block}.attn.{ours.format(each)}" for each in "qkv"),
        f"{part}.{theirs}_attn.proj": (f"{block}.attn.{'to_out.0' if theirs == 'img' else 'to_add_out'}",),
        **{
            f"{part}.{theirs}_mlp.{number}": (f"{block}.ff{'' if theirs == 'img' else '_context'}.linear_{way}",)
            for number, way in ((0, "in"), (2, "out"))
        },
    }


_EMBEDDERS = {
    f"{theirs}.{end}_layer": (f"time_guidance_embed.{ours}_embedder.linear_{number}",)
    for theirs, ours in (("time_in", "timestep"), ("guidance_in", "guidance"))
    for number, end in ((1, "in"), (2, "out"))
}
ORIGINAL = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    **_EMBEDDERS,
    **_both_streams("to_{}", "img"),
    **_both_streams("add_{}_proj", "txt"),
    "single_blocks.*.linear1": ("single_transformer_blocks.*.attn.to_qkv_mlp_proj",),
    "single_blocks.*.linear2": ("single_transformer_blocks.*.attn.to_out",),
    **{
        f"{name}.lin": (f"{name}.linear",)
        for name in ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation")
    },
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    "final_layer.linear": ("proj_out",),
}

FLUX2 = Architecture(
    name="Flux2Transformer2DModel",
    inputs=(Projection("x_embedder", "cpq"),),
    outputs=(Projection("proj_out", "cpq"),),
    layout=Layout.TOKENS,
    # The pipeline folds 2 x 2 latents into a token; the transformer's own patch_size is 1.
    latent_patch=lambda config: 2,
    conditioning=_conditioning,
    arguments=_arguments,
    clean_tokens=_reference_tokens,
    beside=behind(_reference_ids),
    references={"Flux2KleinPipeline": range(11), "Flux2Pipeline": range(11)},
    pipeline_latents=lambda state: F.pixel_unshuffle(state, 2),
    reference=("norm_out",),
    adapters=(
        "transformer_blocks.*.ff.linear_in",
        "transformer_blocks.*.ff.linear_out",
        "transformer_blocks.*.ff_context.linear_in",
        "transformer_blocks.*.ff_context.linear_out",
        "time_guidance_embed.timestep_embedder.linear_1",
        "time_guidance_embed.timestep_embedder.linear_2",
        "single_transformer_blocks.*.attn.to_out",
    ),
    original=ORIGINAL,
    # What the authors' adapters mean, so that a conversion can be exported as one.
    color="oklab-paper",
    prompts=_prompts,
    labels=one_hot("encoder_hidden_states", "joint_attention_dim"),
)
