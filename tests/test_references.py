"""References among the tokens of a state: the pixel twin shows them to the network as the latent network would have seen them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import liftkit
from liftkit.asymflow import calibrate
from tests.zoo import ZOO
from tests.zoo.specimen import draw

SIGMA, TEXT = 0.6, 7
SHAPES = {"img_shapes": [[(1, 2, 4), (1, 2, 2)]]}
LAYERS = {"img_shapes": [[(1, 2, 2)] * 3], "additional_t_cond": torch.zeros(1, dtype=torch.long)}
# A slot of the text encoder's sequence for four tokens, references amid the text and the noise behind it.
SLOTS = torch.tensor([[False, True, *[False] * (TEXT - 2), True, True]])
FIRST = {"img_shapes": [[(1, 2, 2), (1, 2, 4)]], "img_mask": SLOTS}


def inside(specimen: Any, model: Any, arguments: dict[str, Any], state: Tensor, time: float) -> Tensor:
    with torch.no_grad(), specimen.float64():
        time_of_batch = specimen.spec.clock.time(torch.tensor([time], dtype=state.dtype))
        return model(hidden_states=state, timestep=time_of_batch, **arguments, return_dict=False)[0]


@pytest.mark.parametrize(
    ("name", "arguments", "noisy"),
    [
        ("QwenImageTransformer2DModel-edit", SHAPES, slice(0, 8)),
        ("QwenImageTransformer2DModel-layered", LAYERS, slice(0, 8)),
        ("QwenImage21Transformer2DModel", FIRST, slice(4, 12)),
    ],
)
def test_tokens_of_references(name: str, arguments: dict[str, Any], noisy: slice) -> None:
    specimen = ZOO[name]
    latent = specimen.transformer().double()
    lift = specimen.lift()
    twin = liftkit.convert_transformer(latent, lift)
    gain, tau = (each.item() for each in calibrate(torch.tensor([SIGMA], dtype=torch.float64), lift.scale))
    arguments = {"encoder_hidden_states": draw(1, TEXT, 24).double(), **arguments}
    x = draw(1, 12, lift.dim).double()
    basis = twin.lift.basis.double()
    z = x @ basis / lift.scale
    z[:, noisy] *= gain * lift.scale
    u = inside(specimen, twin, arguments, x, SIGMA)[:, -12:][:, noisy] @ basis
    predicted = inside(specimen, latent, arguments, z, tau)[:, -12:][:, noisy]
    expected = lift.scale * gain * predicted + (1 - lift.scale * gain) / SIGMA * (x[:, noisy] @ basis)  # Eq. 17
    torch.testing.assert_close(u, expected, atol=1e-9, rtol=0)


def test_items_that_are_references() -> None:
    specimen = ZOO["JoyImageEditTransformer3DModel"]
    latent = specimen.transformer().double()
    lift = specimen.lift()
    twin = liftkit.convert_transformer(latent, lift)
    gain, tau = (each.item() for each in calibrate(torch.tensor([SIGMA], dtype=torch.float64), lift.scale))
    arguments = {"encoder_hidden_states": draw(1, TEXT, 24).double()}
    images = draw(3, 3, 32, 64).double()
    x = torch.nn.functional.pixel_unshuffle(images, lift.fold)[None, :, :, None]
    lowered = lift.lower(images)
    z = lowered[None, :, :, None] / lift.scale
    z[:, -1] *= gain * lift.scale
    u = inside(specimen, twin, arguments, x, SIGMA)[0, -1].squeeze(1)
    u = lift.lower(torch.nn.functional.pixel_shuffle(u[None], lift.fold))
    predicted = inside(specimen, latent, arguments, z, tau)[:, -1].squeeze(2)
    expected = lift.scale * gain * predicted + (1 - lift.scale * gain) / SIGMA * lowered[-1:]
    torch.testing.assert_close(u, expected, atol=1e-9, rtol=0)
