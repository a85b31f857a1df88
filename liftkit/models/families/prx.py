"""PRX: an image transformer on FLUX.1's VAE or on DC-AE, which cuts patches by itself. Its pixel model, known by a bottleneck
behind the input, needs no lift. The stock class has no adapters of its own.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from liftkit.models.conditioning import one_hot, random
from liftkit.models.layout import Layout
from liftkit.models.spec import Architecture, Config, Projection


def _refuse(config: Config) -> str | None:
    return "already a pixel model (bottleneck_size)" if config.get("bottleneck_size") is not None else None


def _prompts(pipeline: Any, prompts: list[str], length: int | None) -> dict[str, Tensor]:
    text, mask, *_ = pipeline.encode_prompt(
        prompts, pipeline._execution_device, do_classifier_free_guidance=False, tokenizer_max_length=length
    )
    return {"encoder_hidden_states": text, "attention_mask": mask}


PRX = Architecture(
    name="PRXTransformer2DModel",
    inputs=(Projection("img_in", "cpq"),),
    outputs=(Projection("final_layer.linear", "cpq"),),
    layout=Layout.IMAGE,
    channel_keys=("in_channels",),
    conditioning=random(encoder_hidden_states=(7, "context_in_dim"), attention_mask=(7,)),
    refuse=_refuse,
    call={"use_resolution_binning": False},
    reference=("final_layer.adaLN_modulation",),
    adapters=("blocks.*.up_proj", "blocks.*.down_proj", "blocks.*.attention.to_out.0"),
    guidance="batch",
    prompts=_prompts,
    labels=one_hot("encoder_hidden_states", "context_in_dim", attention_mask=True),
)
