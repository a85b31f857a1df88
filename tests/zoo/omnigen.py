"""OmniGen, over a tokenizer that spells: it has no text encoder, so that nothing is left out."""

from __future__ import annotations

from typing import Any

import diffusers
from diffusers.pipelines.omnigen import pipeline_omnigen
from diffusers.pipelines.omnigen.processor_omnigen import OmniGenCollator, OmniGenMultiModalProcessor

from tests import vaes
from tests.zoo.specimen import Specimen, speller


class WithoutImages(OmniGenMultiModalProcessor):
    """The stock processor, less its image transforms: they need torchvision, which liftkit does without."""

    def __init__(self, tokenizer: Any, max_image_size: int) -> None:
        self.text_tokenizer, self.max_image_size, self.collator = tokenizer, max_image_size, OmniGenCollator()


def _components() -> dict[str, Any]:
    pipeline_omnigen.OmniGenMultiModalProcessor = WithoutImages
    return {"tokenizer": speller()}


SPECIMENS = (
    Specimen(
        "OmniGenTransformer2DModel",
        {
            "in_channels": 4,
            "patch_size": 2,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "intermediate_size": 48,
            "num_layers": 2,
            "pad_token_id": 0,
            "vocab_size": 64,
            "rope_scaling": {"short_factor": [1.0] * 8, "long_factor": [1.0] * 8},
            "pos_embed_max_size": 32,
            "time_step_dim": 16,
        },
        pipeline="OmniGenPipeline",
        vae=lambda: vaes.kl(8, shift_factor=None),
        call=lambda count: {"prompt": ["a red seven"] * count, "guidance_scale": 3.0, "max_input_image_size": 1024},
        factor=8,
        missing=(),
        components=_components,
        scheduler=lambda: diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True, num_train_timesteps=1),
    ),
)
