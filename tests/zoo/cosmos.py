"""Cosmos, of Anima."""

from __future__ import annotations

from tests.zoo.specimen import Specimen

MODULAR = "diffusers runs Anima by modular pipelines alone"

SPECIMENS = (
    Specimen(
        "CosmosTransformer3DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 2,
            "text_embed_dim": 24,
            "adaln_lora_dim": 8,
            "max_size": (4, 16, 16),
            "extra_pos_embed_type": None,
        },
        without={"pipeline": MODULAR, "convert": MODULAR, "finetune": MODULAR, "prompts": MODULAR},
    ),
)
