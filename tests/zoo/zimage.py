"""Z-Image."""

from __future__ import annotations

from tests import vaes
from tests.zoo.specimen import Specimen, draw

SPECIMENS = (
    Specimen(
        "ZImageTransformer2DModel",
        {
            "in_channels": 4,
            "dim": 32,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": 24,
            "axes_dims": [4, 4, 8],
            "axes_lens": [1024, 32, 32],
        },
        pipeline="ZImagePipeline",
        vae=vaes.kl,
        call=lambda count: {
            "prompt_embeds": list(draw(count, 7, 24)),
            "negative_prompt_embeds": list(draw(count, 5, 24, seed=6)),
            "guidance_scale": 3.0,
            "cfg_normalization": 1.0,
        },
        plain={"cfg_normalization": False},
        # Texts of their own lengths, as the stock method cuts them.
        stubs={"_encode_prompt": lambda prompt, **more: [draw(len(text) + 3, 24, seed=len(text)) for text in prompt]},
    ),
)
