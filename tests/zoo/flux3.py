"""FLUX.3, of which diffusers has modular pipelines only."""

from __future__ import annotations

from tests.zoo.specimen import Specimen

SPECIMENS = (
    Specimen(
        "Flux3Transformer2DModel",
        {
            "in_channels": 16,
            "cond_in_channels": 16,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 24,
            "timestep_channels": 16,
            "axes_dims_rope": (4, 4, 4, 4),
        },
        without=dict.fromkeys(
            ("pipeline", "convert", "finetune", "prompts"), "diffusers has modular pipelines of it only"
        ),
    ),
)
