"""AuraFlow."""

from __future__ import annotations

from tests import vaes
from tests.zoo.specimen import Specimen, masked

SPECIMENS = (
    Specimen(
        "AuraFlowTransformer2DModel",
        {
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "num_mmdit_layers": 1,
            "num_single_dit_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "joint_attention_dim": 24,
            "caption_projection_dim": 32,
            "pos_embed_max_size": 1024,
        },
        pipeline="AuraFlowPipeline",
        vae=lambda: vaes.kl(shift_factor=None),
        call=lambda count: {**masked(count), "guidance_scale": 3.0},
        without={"prompts": "its encode_prompt calls tokenizer and encoder itself, which the specimen lacks"},
    ),
)
