"""FLUX.2 klein."""

from __future__ import annotations

from tests import tiny, vaes
from tests.zoo.specimen import Specimen, prompts

SPECIMENS = (
    Specimen(
        "Flux2Transformer2DModel",
        tiny.FLUX2,
        pipeline="Flux2KleinPipeline",
        vae=vaes.flux2,
        call=lambda count: {**prompts("prompt_embeds", 7, 24, count=count), "guidance_scale": 3.0},
        without={"prompts": "tests/test_tiny_klein.py runs the real text encoder"},
    ),
)
