"""JiT: made from nothing, so that its conversion from latents is a matter of the bare theorem alone."""

from __future__ import annotations

from tests.zoo.specimen import Specimen

NONE = "JiT has no latent model to be converted from"
SPECIMENS = (
    Specimen(
        "JiTTransformer2DModel",
        {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "num_layers": 3,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "bottleneck_dim": 8,
            "num_classes": 10,
            "context_tokens": 3,
            "context_start": 1,
        },
        without={"pipeline": NONE, "convert": NONE, "finetune": NONE, "prompts": NONE},
    ),
)
