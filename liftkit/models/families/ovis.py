"""Ovis-Image: FLUX.1's blocks without pooled text; text tokens are counted along both axes of the image, and padding is seen."""

from __future__ import annotations

from liftkit.models.conditioning import encoded, random
from liftkit.models.flux_like import ADAPTERS, INPUTS, OUTPUTS, two_by_two, with_ids
from liftkit.models.layout import Layout
from liftkit.models.spec import Architecture

OVIS = Architecture(
    name="OvisImageTransformer2DModel",
    inputs=INPUTS,
    outputs=OUTPUTS,
    layout=Layout.TOKENS,
    latent_patch=two_by_two,
    conditioning=random(encoder_hidden_states=(7, "joint_attention_dim")),
    arguments=with_ids(counted=True),
    reference=("norm_out",),
    adapters=ADAPTERS,
    prompts=encoded("encoder_hidden_states", do_classifier_free_guidance=False),
)
