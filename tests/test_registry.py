"""Architectures from outside: registered, converted, and held to Theorem 1."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from diffusers import LTXVideoTransformer3DModel

import liftkit
from liftkit.conversion.tied import TiedRun
from liftkit.errors import UsageError
from liftkit.models import registry
from liftkit.models.conditioning import random
from liftkit.models.layout import Layout
from liftkit.models.spec import Architecture, Clock, Projection
from tests import tiny

LTX = Architecture(
    name="LTXVideoTransformer3DModel",
    inputs=(Projection("proj_in", "cpq"),),
    outputs=(Projection("proj_out", "cpq"),),
    layout=Layout.TOKENS,
    latent_patch=lambda config: config["patch_size"],
    clock=Clock.THOUSAND_SIGMA,
    conditioning=random(encoder_hidden_states=(7, "caption_channels"), encoder_attention_mask=(7,)),
    arguments=lambda grid, given: {"num_frames": 1, "height": grid.rows, "width": grid.columns, **given},
)


@pytest.fixture
def ltx() -> Iterator[Architecture]:
    """A video model as somebody else's package would add it for images; forgotten afterwards."""
    liftkit.register(LTX)
    yield LTX
    del registry._KNOWN[LTX.name]


def test_an_architecture_from_outside_is_converted_and_obeys_theorem_1(ltx: Architecture) -> None:
    assert liftkit.architectures()[ltx.name] is ltx
    config = {"in_channels": 8, "out_channels": 8, "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 1}
    latent = LTXVideoTransformer3DModel(**config, cross_attention_dim=24, caption_channels=16)
    latent = tiny._alive(latent).double()
    random_basis = torch.linalg.qr(torch.randn(48, 8, generator=torch.Generator().manual_seed(0)).double())[0]
    lift = liftkit.Lift(random_basis, 1.7, patch_size=4, latent_patch=1)
    twin = liftkit.convert_transformer(latent, lift)
    assert type(twin).__name__ == "AsymLTXVideoTransformer3DModel"
    assert isinstance(twin, LTXVideoTransformer3DModel)
    run = TiedRun(ltx, dict(latent.config), lift, steps=6, seed=0, dtype=torch.float64)
    with torch.no_grad():
        reference = run.sample_latent(liftkit.open_flow(latent))
        assert run.deviation(liftkit.open_flow(twin), reference) < 1e-9


def test_a_name_is_registered_once(ltx: Architecture) -> None:
    liftkit.register(ltx)
    with pytest.raises(UsageError, match="registered already"):
        liftkit.register(replace(ltx, layout=Layout.IMAGE))


def test_an_unknown_class_names_those_that_are_known() -> None:
    with pytest.raises(UsageError, match=r"'Flux2Transformer3DModel' is not supported; .*did you mean Flux2"):
        registry.architecture("Flux2Transformer3DModel")
