"""JoyImage-Edit, without a reference: the pipeline renders from a prompt alone too."""

from __future__ import annotations

from typing import Any

from tests import vaes
from tests.zoo.qwen import _embeds
from tests.zoo.specimen import Specimen, masked


def _prepare(pipeline: Any, height: int, width: int) -> None:
    # The stock processor knows sizes near 1024 alone.
    pipeline.vae_image_processor.get_default_height_width = lambda *args: (height, width)


SPECIMENS = (
    Specimen(
        "JoyImageEditTransformer3DModel",
        {
            "in_channels": 4,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "text_dim": 24,
            "num_layers": 2,
            "rope_dim_list": [4, 6, 6],
        },
        pipeline="JoyImageEditPipeline",
        vae=vaes.wan,
        call=lambda count: {**masked(count, mask="prompt_embeds_mask"), "guidance_scale": 3.0},
        factor=8,
        missing=("text_encoder", "tokenizer", "processor"),
        prepare=_prepare,
        stubs={"_get_qwen_prompt_embeds": _embeds},
        plain={"guidance_scale": 1.0},
    ),
)
