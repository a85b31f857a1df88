"""DiT as SiT, with and without a learned variance: diffusers has no pipeline for the flow."""

from __future__ import annotations

from tests.zoo.specimen import Specimen

CONFIG = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "norm_num_groups": 4,
    "sample_size": 8,
    "num_embeds_ada_norm": 10,
}
NONE = "diffusers has no pipeline for SiT"
WITHOUT = {"pipeline": NONE, "convert": NONE, "finetune": NONE, "prompts": NONE}
SPECIMENS = (
    Specimen("DiTTransformer2DModel", CONFIG, without=WITHOUT),
    Specimen("DiTTransformer2DModel", {**CONFIG, "out_channels": 8}, without=WITHOUT, variant="variance"),
)
