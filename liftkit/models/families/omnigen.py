"""OmniGen: one sequence of text, time and image, with its own token embedding in the transformer and no text encoder.

Captions are token ids; what a sequence may attend to and where it stands follows from their mask and the grid. Reference
images have a projection of their own and come as a list of clean latents. Time runs from 0 to 1 and is not scaled, the output
is x_0 - eps, and its scheduler counts the noise levels upward (``invert_sigmas``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from liftkit.models.layout import Layout
from liftkit.models.spec import Architecture, Clock, Config, Grid, Projection

LENGTH = 256
"""Tokens that captions are padded to where no other length is asked for."""
PAD = 2
"""The token that the stock processor pads with, in front."""


def _conditioning(config: Config, batch: int, generator: torch.Generator) -> dict[str, Any]:
    ids = torch.randint(0, config["vocab_size"], (batch, 7), generator=generator)
    return {"input_ids": ids, "text_mask": torch.ones_like(ids, dtype=torch.bool)}


def _sequence(grid: Grid, given: Mapping[str, Any]) -> dict[str, Any]:
    """As the stock collator: text and time look back, the image looks at all, padding in front is looked at by none."""
    arguments = {"input_img_latents": [], "input_image_sizes": {}, **given}
    text = arguments.pop("text_mask", None)
    if text is None:
        return arguments
    image = grid.rows * grid.columns
    present = F.pad(text.bool(), (0, 1 + image), value=True)
    total, causal = present.shape[1], present.shape[1] - image
    looks = torch.ones(total, total, dtype=torch.bool, device=grid.device).tril()
    looks[causal:] = True
    looks = looks & present.unsqueeze(1)
    looks = looks | ~present.unsqueeze(2)  # a row that looks at nothing would be no number
    position = (present.long().cumsum(dim=1) - 1).clamp(min=0)
    return {**arguments, "attention_mask": looks.float(), "position_ids": position}


def _prompts(pipeline: Any, prompts: list[str], length: int | None) -> dict[str, Tensor]:
    length, processor = length or LENGTH, pipeline.multimodal_processor
    rows = [processor.process_multi_modal_prompt(text, None)["input_ids"][-length:] for text in prompts]
    ids = torch.tensor([[PAD] * (length - len(row)) + row for row in rows])
    lengths = torch.tensor([[len(row)] for row in rows])
    return {"input_ids": ids, "text_mask": torch.arange(length) >= length - lengths}


OMNIGEN = Architecture(
    name="OmniGenTransformer2DModel",
    inputs=(
        Projection("patch_embedding.output_image_proj", "cpq"),
        Projection("patch_embedding.input_image_proj", "cpq"),
    ),
    outputs=(Projection("proj_out", "pqc"),),
    layout=Layout.IMAGE,
    clock=Clock.ONE_MINUS_SIGMA,
    sign=-1,
    channel_keys=("in_channels",),
    conditioning=_conditioning,
    arguments=_sequence,
    clean_inputs=("input_img_latents",),
    reference=("norm_out",),
    adapters=("layers.*.mlp.gate_up_proj", "layers.*.mlp.down_proj", "layers.*.self_attn.to_out.0"),
    guidance="batch conditional first",
    encoders=("tokenizer",),
    prompts=_prompts,
)
