"""The mathematics: tokens, calibration, recovery, color, lift."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import liftkit
from liftkit.color import SRGB, Oklab, _cube_root, color_from_dict, srgb_to_linear, to_signed
from liftkit.lift import Lift
from liftkit.tokens import patchify, token_order, unpatchify
from tests import tiny


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(1, 5))
def test_patchify_round_trip(batch: int, channels: int, rows: int, columns: int, patch: int) -> None:
    x = torch.randn(batch, channels, rows * patch, columns * patch)
    tokens = patchify(x, patch)
    assert tokens.shape == (batch, rows * columns, channels * patch * patch)
    assert torch.equal(unpatchify(tokens, patch, rows * patch, columns * patch), x)


def test_patchify_order_is_channel_row_column() -> None:
    x = torch.arange(2 * 4 * 6.0).reshape(1, 2, 4, 6)
    token = patchify(x, 2)[0, 4]  # second row of tokens, second column
    assert torch.equal(token, x[0, :, 2:4, 2:4].reshape(-1))


def test_patchify_refuses_what_does_not_divide() -> None:
    with pytest.raises(ValueError, match="5 x 4"):
        patchify(torch.zeros(1, 3, 5, 4), 2)
    with pytest.raises(ValueError, match="3 tokens"):
        unpatchify(torch.zeros(1, 3, 12), 2, 4, 4)


@pytest.mark.parametrize("order", ["cpq", "pqc"])
@pytest.mark.parametrize("fold", [1, 2, 4])
def test_token_order_describes_the_folded_layout(order: str, fold: int) -> None:
    channels, patch = 3, 2
    side = fold * patch
    image = torch.randn(1, channels, 2 * side, 3 * side)
    folded = torch.nn.functional.pixel_unshuffle(image, fold)
    native = patchify(folded, patch)
    if order == "pqc":
        grid = native.reshape(1, -1, channels * fold * fold, patch, patch)
        native = grid.permute(0, 1, 3, 4, 2).flatten(2)
    assert torch.equal(patchify(image, side)[..., token_order(channels, patch, order, fold)], native)


@pytest.mark.parametrize("scale", [0.3, 1.0, 2.4375])
@pytest.mark.parametrize("sigma", [1e-3, 0.1, 0.5, 0.999, 1.0])
def test_recovery_is_exact_for_a_perfect_network(scale: float, sigma: float) -> None:
    """u_cal = P eps - x_0 / s must give u = eps - x_0 back (Eq. 17)."""
    basis = tiny.lift().basis
    x0, noise = torch.randn(2, 2, 5, tiny.DIM, dtype=torch.float64)
    sigmas = torch.full((2,), sigma, dtype=torch.float64)
    x_t = torch.lerp(x0, noise, sigma)
    u_cal = noise @ basis @ basis.T - x0 / scale
    u = liftkit.recover_velocity(u_cal, x_t, sigmas, basis, scale)
    torch.testing.assert_close(u, noise - x0, rtol=1e-10, atol=1e-10)


def test_recovery_equals_the_paper_s_formula_with_its_clamps() -> None:
    basis, scale, floor = tiny.lift().basis, 1.9, 4e-2
    u_cal, x_t = torch.randn(2, 3, 4, tiny.DIM, dtype=torch.float64)
    sigma = torch.tensor([1e-3, 3e-2, 0.7], dtype=torch.float64)
    gain, _ = liftkit.calibrate(sigma, scale)
    k, s, floored = gain[:, None, None], scale, sigma.clamp(min=floor)[:, None, None]
    p = basis @ basis.T
    paper = s * k * u_cal @ p + (1 - s * k) / floored * x_t @ p
    paper = paper + (x_t + s * u_cal) @ (torch.eye(tiny.DIM, dtype=torch.float64) - p) / floored
    torch.testing.assert_close(liftkit.recover_velocity(u_cal, x_t, sigma, basis, scale, floor), paper)


def test_rank_zero_and_full_rank_are_the_known_parameterizations() -> None:
    u, x_t = torch.randn(2, 1, 2, 12, dtype=torch.float64)
    sigma = torch.tensor([0.4], dtype=torch.float64)
    full = torch.eye(12, dtype=torch.float64)
    torch.testing.assert_close(liftkit.recover_velocity(u, x_t, sigma, full, 1.0), u)
    none = torch.zeros(12, 0, dtype=torch.float64)
    torch.testing.assert_close(liftkit.recover_velocity(u, x_t, sigma, none, 1.0), (x_t + u) / 0.4)


def test_calibration_maps_states_onto_latents() -> None:
    """A^T (k x_t) = z_tau, and lift_sigma undoes tau."""
    lift, sigma = tiny.lift(2.2), torch.tensor(0.37, dtype=torch.float64)
    z0, noise = torch.randn(6, tiny.RANK, dtype=torch.float64), torch.randn(6, tiny.DIM, dtype=torch.float64)
    gain, tau = liftkit.calibrate(sigma, lift.scale)
    x_t = torch.lerp(lift.raise_tokens(z0), noise, sigma)
    torch.testing.assert_close(gain * x_t @ lift.basis, torch.lerp(z0, noise @ lift.basis, tau))
    torch.testing.assert_close(liftkit.lift_sigma(tau, lift.scale), sigma)


def test_recovery_computes_in_float32_at_least() -> None:
    u, x = torch.randn(2, 1, 2, tiny.DIM, dtype=torch.bfloat16)
    out = liftkit.recover_velocity(u, x, torch.tensor([0.5], dtype=torch.bfloat16), tiny.lift().basis.float(), 1.3)
    assert out.dtype == torch.float32
    assert liftkit.calibrate(torch.tensor(0.5, dtype=torch.float16), 2.0)[0].dtype == torch.float32


def test_oklab_of_known_colors() -> None:
    """Ottosson's own examples: white, black, and sRGB red, green, blue."""
    colors = torch.tensor([[1, 1, 1], [-1, -1, -1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], dtype=torch.float64)
    expected = torch.tensor(
        [
            [1.0, 0.0, 0.0],
            [0.0, 0.0, 0.0],
            [0.627955, 0.224863, 0.125846],
            [0.866440, -0.233888, 0.179498],
            [0.452014, -0.032457, -0.311528],
        ],
        dtype=torch.float64,
    )
    lab = Oklab((0, 0, 0), 1).encode(colors.reshape(5, 3, 1, 1)).reshape(5, 3)
    torch.testing.assert_close(lab, expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("space", [Oklab(), SRGB(), Oklab((0.5, 0.1, 0), 0.3), SRGB((0.1, 0, 0), 0.5)])
def test_color_round_trip_and_description(space: liftkit.color.ColorSpace) -> None:
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    images[:, :, 0] = -1.0
    torch.testing.assert_close(space.decode(space.encode(images)), images, atol=2e-5, rtol=0)
    assert color_from_dict(space.to_dict()) == space


@pytest.mark.parametrize("space", [Oklab(), SRGB((0.1, 0, 0), 0.5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_color_keeps_its_precision_under_autocast(space: liftkit.color.ColorSpace, dtype: torch.dtype) -> None:
    images = (torch.rand(2, 3, 8, 8) * 2 - 1).to(dtype)
    colors = space.encode(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(space.encode(images), colors)
        torch.testing.assert_close(space.decode(colors), images.float(), atol=2e-5, rtol=0)


@pytest.mark.parametrize("space", [Oklab(), SRGB((0.1, 0, 0), 0.5)])
def test_colors_of_eight_bits_are_those_of_the_same_floats(space: liftkit.color.ColorSpace) -> None:
    levels = torch.arange(256).repeat(3, 7)[:, :, None]
    levels[1], levels[2] = levels[1].roll(91, 0), levels[2].roll(17, 0)
    images = levels[None].to(torch.uint8)
    found = space.encode(images)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, space.encode(to_signed(images)), atol=3e-6, rtol=0)
    assert torch.equal(to_signed(to_signed(images)), to_signed(images))


def test_transfer_function_and_cube_root_to_float_rounding() -> None:
    """Powers are computed by logarithms; the definitions are the oracle."""
    values = torch.cat([torch.linspace(0, 1, 1001), torch.logspace(-12, 0, 200)]).double()
    linear = torch.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    root = torch.where(values < 1e-9, values * 1e6, values ** (1 / 3))
    for dtype, tolerance in ((torch.float32, 4e-7), (torch.float64, 1e-14)):
        torch.testing.assert_close(srgb_to_linear(values.to(dtype)).double(), linear, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(_cube_root(values.to(dtype)).double(), root, rtol=2 * tolerance, atol=tolerance)
    assert srgb_to_linear(torch.zeros(1)) == _cube_root(torch.zeros(1)) == 0


def test_color_is_clamped_to_the_gamut_and_differentiable_at_black() -> None:
    assert Oklab().decode(torch.full((1, 3, 2, 2), 40.0)).abs().max() <= 1.0
    black = torch.full((1, 3, 2, 2), -1.0, requires_grad=True)
    Oklab().encode(black).sum().backward()
    assert torch.isfinite(black.grad).all()


def test_fitted_color_has_zero_mean_and_unit_scale() -> None:
    images = torch.rand(4, 3, 16, 16) ** 2 * 2 - 1
    values = Oklab.fitted(images).encode(images).double()
    assert values.mean(dim=(0, 2, 3)).abs().max() < 1e-5
    assert abs(values.square().mean().item() - 1.0) < 1e-4


def test_color_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="three means"):
        Oklab((0, 0), 1)
    with pytest.raises(ValueError, match="cannot read"):
        color_from_dict({"name": "cmyk"})


def test_lift_saves_and_loads(tmp_path: Path) -> None:
    lift = tiny.lift(1.25, color=SRGB((0.1, 0, 0), 0.5), figures={"kind": "test"})
    lift.save(tmp_path / "lift.safetensors")
    again = Lift.load(tmp_path / "lift.safetensors")
    assert torch.equal(again.basis, lift.basis)
    assert (again.scale, again.patch_size, again.latent_patch, again.color) == (1.25, tiny.PATCH, 2, lift.color)
    assert again.figures == {"kind": "test"}
    assert (again.rank, again.dim, again.fold, again.latent_channels) == (tiny.RANK, tiny.DIM, 2, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"basis": torch.eye(47)[:, :16]}, "RGB patch"),
        ({"basis": 2 * torch.eye(48)[:, :16]}, "not orthonormal"),
        ({"scale": -1.0}, "positive number"),
        ({"scale": float("nan")}, "positive number"),
        ({"latent_patch": 3}, "must divide"),
    ],
)
def test_lift_refuses_what_does_not_hold(changes: dict, message: str) -> None:
    good = {"basis": torch.eye(48)[:, :16], "scale": 1.0, "patch_size": 4, "latent_patch": 2}
    with pytest.raises(ValueError, match=message):
        Lift(**{**good, **changes})


def test_loading_what_is_no_lift(tmp_path: Path) -> None:
    liftkit.TokenMoments(4, 12).save(tmp_path / "moments.safetensors")
    with pytest.raises(liftkit.UsageError, match="not a lift"):
        Lift.load(tmp_path / "moments.safetensors")
