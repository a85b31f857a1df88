"""Moments and the Procrustes fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import orthogonal_procrustes

import liftkit
from liftkit.color import Oklab
from liftkit.fit.alignment import figures as figures_of
from liftkit.fit.stream import fitted_color, normalized
from tests import tiny


def tokens(count: int = 500, noise: float = 0.1, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents, and pixels that are 1.7 A z plus noise."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(1, count, tiny.RANK, dtype=torch.float64, generator=generator)
    x = tiny.lift().raise_tokens(z) + noise * torch.randn(1, count, tiny.DIM, dtype=torch.float64, generator=generator)
    return z, x


def moments(*pairs: tuple[torch.Tensor, torch.Tensor]) -> liftkit.TokenMoments:
    result = liftkit.TokenMoments(tiny.RANK, tiny.DIM)
    for z, x in pairs:
        result.update(z, x)
    return result


def test_procrustes_recovers_a_known_lift() -> None:
    lift = liftkit.fit_procrustes(moments(tokens(noise=0.0)))
    torch.testing.assert_close(lift.basis, tiny.lift().basis, atol=1e-9, rtol=0)
    assert lift.scale == pytest.approx(1.7, rel=1e-9)
    assert lift.figures["scale_least_squares"] == pytest.approx(1.7, rel=1e-9)
    assert lift.figures["energy_captured"] == pytest.approx(1.0)


def test_procrustes_agrees_with_scipy() -> None:
    """On square data scipy's orthogonal Procrustes is the same problem."""
    z, x = (torch.randn(1, 300, 12, dtype=torch.float64) for _ in range(2))
    square = liftkit.TokenMoments(12, 12)
    square.update(z, x)
    basis = liftkit.fit.procrustes.polar(square.cross.T)
    expected, _ = orthogonal_procrustes(z[0].numpy(), x[0].numpy())
    np.testing.assert_allclose(basis.numpy().T, expected, atol=1e-9)


def test_no_other_rotation_is_better() -> None:
    found = moments(tokens(noise=1.0))
    lift = liftkit.fit_procrustes(found)
    best = (found.cross * lift.basis.T).sum()
    for seed in range(20):
        other = tiny.lift(seed=seed).basis
        assert (found.cross * other.T).sum() < best
    turned = torch.linalg.qr(lift.basis + 1e-3 * torch.randn_like(lift.basis))[0]
    turned = turned * torch.sign((turned * lift.basis).sum(dim=0))
    assert (found.cross * turned.T).sum() < best


def test_moments_add_up_and_ignore_batches_and_dtype(tmp_path: Path) -> None:
    parts = [tokens(100, seed=seed) for seed in range(4)]
    together = moments(*parts)
    added = moments(*parts[:1]) + moments(*parts[1:])
    for name in ("cross", "pixel_gram", "latent_gram", "pixel_sum", "latent_sum"):
        torch.testing.assert_close(getattr(added, name), getattr(together, name), rtol=1e-12, atol=1e-12)
        assert getattr(added, name).dtype == torch.float64
    assert (added.count, added.images) == (400, 4)
    half = liftkit.TokenMoments(tiny.RANK, tiny.DIM)
    half.update(*(part.half() for part in parts[0]))
    assert half.cross.dtype == torch.float64
    together.save(tmp_path / "m.safetensors")
    again = liftkit.TokenMoments.load(tmp_path / "m.safetensors")
    assert torch.equal(again.cross, together.cross)
    assert again.count == together.count


@pytest.mark.parametrize("count", [1, 256, 257, 3000])
def test_moments_of_eight_bits_are_exact(count: int) -> None:
    """Products in float32 are rounded nowhere: with whole numbers in place of colors the sums agree to the last digit."""
    x, z = torch.randint(0, 256, (1, count, 48), dtype=torch.uint8), torch.randn(1, count, 16)
    x[:, :, 0], x[:, :, 1] = 255, 0
    found = liftkit.TokenMoments(16, 48)
    with torch.autocast("cpu", torch.bfloat16):
        found.update(z, x)
    odd, latents = 2 * x[0].numpy().astype(np.int64) - 255, z[0].double().numpy()
    assert np.array_equal(np.rint(found.pixel_gram.numpy() * 255**2), odd.T @ odd)
    np.testing.assert_allclose(found.pixel_gram.numpy(), odd.T @ odd / 255**2, rtol=1e-14, atol=0)
    np.testing.assert_allclose(found.pixel_sum.numpy(), odd.sum(0) / 255, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(found.cross.numpy(), latents.T @ odd / 255, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("rank", "dim"), [(1, 1), (1, 2), (3, 12), (16, 48)])
def test_moments_equal_plain_sums(rank: int, dim: int) -> None:
    """Products are taken block by block; no block is lost."""
    z, x = torch.randn(2, 30, rank), torch.randn(2, 30, dim)
    found = liftkit.TokenMoments(rank, dim)
    found.update(z, x)
    zs, xs = (tokens_.double().flatten(0, 1).numpy() for tokens_ in (z, x))
    expected = {"latent_gram": zs.T @ zs, "pixel_gram": xs.T @ xs, "cross": zs.T @ xs}
    for name, value in {**expected, "latent_sum": zs.sum(0), "pixel_sum": xs.sum(0)}.items():
        np.testing.assert_allclose(getattr(found, name).numpy(), value, rtol=1e-12, atol=1e-12)


def test_moments_refuse_what_does_not_pair_up() -> None:
    empty = liftkit.TokenMoments(tiny.RANK, tiny.DIM)
    z, x = tokens(8)
    with pytest.raises(ValueError, match="do not pair up"):
        empty.update(z[:, :4], x)
    with pytest.raises(ValueError, match="these moments are of"):
        empty.update(x, z)
    with pytest.raises(ValueError, match="NaN"):
        empty.update(z, x * float("nan"))
    assert empty.count == 0
    with pytest.raises(ValueError, match="cannot add"):
        empty + liftkit.TokenMoments(2, 12)


def test_fewer_tokens_than_the_rank_and_images_of_one_color() -> None:
    with pytest.raises(ValueError, match="5 tokens cannot determine"):
        liftkit.fit_procrustes(moments(tokens(5)))
    z, x = tokens(50)
    with pytest.raises(ValueError, match="one color"):
        liftkit.fit_procrustes(moments((z, 0 * x)))


def test_normalizing_moments_equals_normalizing_pixels() -> None:
    color = Oklab((0.5, -0.1, 0.2), 0.3)
    z, x = tokens(200)
    mean = torch.tensor(color.mean, dtype=torch.float64).repeat_interleave(tiny.DIM // 3)
    after, direct = normalized(moments((z, x)), color), moments((z, (x - mean) / color.std))
    for name in ("cross", "pixel_gram", "latent_gram", "pixel_sum", "latent_sum"):
        torch.testing.assert_close(getattr(after, name), getattr(direct, name), rtol=1e-11, atol=1e-9)


def test_color_fitted_from_moments_equals_that_from_images() -> None:
    images = torch.rand(3, 3, 16, 16).double() * 2 - 1
    x = liftkit.patchify(Oklab((0, 0, 0), 1).encode(images), tiny.PATCH)
    found = fitted_color(Oklab, moments((torch.randn(*x.shape[:2], tiny.RANK), x)))
    expected = Oklab.fitted(images)
    assert found.mean == pytest.approx(expected.mean, rel=1e-9)
    assert found.std == pytest.approx(expected.std, rel=1e-9)


def test_figures_equal_what_tokens_say() -> None:
    z, x = tokens(400, noise=0.5)
    z, x = z + 0.2, x + 0.1
    found = moments((z, x))
    lift = liftkit.fit_procrustes(found)
    figures = figures_of(lift, found)
    variance = (x - x.mean(dim=1, keepdim=True)).square().sum()
    residual = (x - lift.raise_tokens(z)).square()
    assert figures["r2_pixels"] == pytest.approx((1 - residual.sum() / variance).item(), rel=1e-9)
    best = (x - figures["scale_lsq"] * z @ lift.basis.T).square().sum()
    assert figures["r2_pixels_lsq"] == pytest.approx((1 - best / variance).item(), rel=1e-9)
    assert best < residual.sum()
    design = torch.cat([z[0], torch.ones(400, 1, dtype=torch.float64)], dim=1)
    ceiling = (x[0] - design @ torch.linalg.lstsq(design, x[0]).solution).square().sum()
    assert figures["r2_pixels_linear"] == pytest.approx((1 - ceiling / variance).item(), rel=1e-6)
    design = torch.cat([x[0] @ lift.basis, torch.ones(400, 1, dtype=torch.float64)], dim=1)
    back = (z[0] - design @ torch.linalg.lstsq(design, z[0]).solution).square().sum(dim=0)
    explained = 1 - back / (z[0] - z[0].mean(dim=0)).square().sum(dim=0)
    assert figures["r2_latents"] == pytest.approx(explained.mean().item(), rel=1e-6)
    aligned = (z * (x @ lift.basis)).sum() / (z.norm() * (x @ lift.basis).norm())
    assert figures["cosine"] == pytest.approx(aligned.item(), rel=1e-9)
    assert figures["scale_gap"] == pytest.approx(1 - aligned.item(), rel=1e-9)
    captured = (x @ lift.basis).square().sum() / x.square().sum()
    assert figures["energy_captured"] == pytest.approx(captured.item(), rel=1e-9)
    best = torch.linalg.svdvals(x[0]).square()
    assert figures["energy_best"] == pytest.approx((best[: tiny.RANK].sum() / best.sum()).item(), rel=1e-9)
    assert figures["r2_pixels"] < figures["r2_pixels_linear"] < 1
