"""AuraFlow: a learned table of positions, from which the token grid takes the middle; no mask of the text in the network."""

from __future__ import annotations

from liftkit.models.conditioning import encoded, random
from liftkit.models.layout import Layout
from liftkit.models.spec import Architecture, Projection

AURAFLOW = Architecture(
    name="AuraFlowTransformer2DModel",
    inputs=(Projection("pos_embed.proj", "cpq"),),
    outputs=(Projection("proj_out", "pqc"),),
    layout=Layout.IMAGE,
    conditioning=random(encoder_hidden_states=(7, "joint_attention_dim")),
    reference=("norm_out",),
    adapters=(
        "joint_transformer_blocks.*.ff.linear_1",
        "joint_transformer_blocks.*.ff.linear_2",
        "joint_transformer_blocks.*.ff.out_projection",
        "joint_transformer_blocks.*.attn.to_out.0",
        "single_transformer_blocks.*.ff.linear_1",
        "single_transformer_blocks.*.ff.linear_2",
        "single_transformer_blocks.*.ff.out_projection",
        "single_transformer_blocks.*.attn.to_out.0",
    ),
    guidance="batch",
    prompts=encoded("encoder_hidden_states", do_classifier_free_guidance=False),
)
