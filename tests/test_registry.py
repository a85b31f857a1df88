"""Architectures from outside: registered, converted, and held to Theorem 1."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel

import liftkit
from liftkit.errors import UsageError
from liftkit.models import registry
from liftkit.models.flow import euler
from liftkit.models.layout import Layout
from liftkit.models.spec import Architecture, Projection, randn
from tests import tiny


def _positions(grid: Any, conditioning: Any) -> dict[str, Any]:
    image = torch.cartesian_prod(torch.arange(1), torch.arange(grid.rows), torch.arange(grid.columns)).float()
    return {"img_ids": image, "txt_ids": torch.zeros(conditioning["encoder_hidden_states"].shape[1], 3)}


FLUX1 = Architecture(
    name="FluxTransformer2DModel",
    inputs=(Projection("x_embedder", "cpq"),),
    outputs=(Projection("proj_out", "cpq"),),
    layout=Layout.TOKENS,
    latent_patch=lambda config: 2,
    conditioning=lambda config, batch, generator: {
        "encoder_hidden_states": randn(generator, batch, 7, config["joint_attention_dim"]),
        "pooled_projections": randn(generator, batch, config["pooled_projection_dim"]),
    },
    arguments=lambda grid, given: {**_positions(grid, given), **given},
)


@pytest.fixture
def flux1() -> Iterator[Architecture]:
    """FLUX.1 as somebody else's package would add it; forgotten afterwards."""
    liftkit.register(FLUX1)
    yield FLUX1
    del registry._KNOWN[FLUX1.name]


def test_an_architecture_from_outside_is_converted_and_obeys_theorem_1(flux1: Architecture) -> None:
    assert liftkit.architectures()[flux1.name] is flux1
    latent = tiny._alive(
        FluxTransformer2DModel(
            in_channels=tiny.RANK,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=24,
            pooled_projection_dim=16,
            axes_dims_rope=(4, 6, 6),
        )
    ).double()
    lift = tiny.lift()
    twin = liftkit.convert_transformer(latent, lift)
    assert type(twin).__name__ == "AsymFluxTransformer2DModel"
    assert isinstance(twin, FluxTransformer2DModel)
    generator = torch.Generator().manual_seed(3)
    asked = {key: value.double() for key, value in flux1.conditioning(latent.config, 2, generator).items()}
    noise = torch.randn(2, 3, 8, 12, dtype=torch.float64, generator=generator)
    tau = torch.linspace(1, 0, 6, dtype=torch.float64)
    z = euler(liftkit.open_flow(latent), lift.lower(noise), tau, asked)
    x = euler(liftkit.open_flow(twin), noise, liftkit.lift_sigma(tau, lift.scale), asked)
    lifted = liftkit.unpatchify(lift.raise_tokens(liftkit.patchify(z, 2)), tiny.PATCH, 8, 12)
    assert ((x - lifted).abs().max() / lifted.abs().max()).item() < 1e-9


def test_a_name_is_registered_once(flux1: Architecture) -> None:
    liftkit.register(flux1)
    with pytest.raises(UsageError, match="registered already"):
        liftkit.register(replace(flux1, layout=Layout.IMAGE))


def test_an_unknown_class_names_those_that_are_known() -> None:
    with pytest.raises(UsageError, match=r"'Flux2Transformer3DModel' is not supported; .*did you mean Flux2"):
        registry.architecture("Flux2Transformer3DModel")
