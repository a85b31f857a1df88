"""ERNIE-Image."""

from __future__ import annotations

from tests import vaes
from tests.zoo.specimen import Specimen, draw

SPECIMENS = (
    Specimen(
        "ErnieImageTransformer2DModel",
        {
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_layers": 2,
            "ffn_hidden_size": 48,
            "in_channels": 16,
            "out_channels": 16,
            "text_in_dim": 24,
            "rope_axes_dim": (4, 6, 6),
        },
        pipeline="ErnieImagePipeline",
        vae=vaes.flux2,
        call=lambda count: {
            "prompt_embeds": list(draw(count, 7, 24)),
            "negative_prompt_embeds": list(draw(count, 5, 24, seed=6)),
            "guidance_scale": 3.0,
        },
        missing=("text_encoder", "tokenizer", "pe", "pe_tokenizer"),
        # Texts of their own lengths, as the stock method gives them.
        stubs={"encode_prompt": lambda prompt, device: [draw(len(text) + 3, 24, seed=len(text)) for text in prompt]},
    ),
)
