"""PCA and Jacobian fits, scales, angles, color spaces and held-out figures."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.decomposition import PCA, IncrementalPCA

import liftkit
from liftkit.color import SRGB, Oklab
from liftkit.data.images import ImageFolder
from liftkit.embedded import TINY_KLEIN
from liftkit.fit import engine
from liftkit.fit.alignment import energy_angle, lift_angle, pixel_r2
from liftkit.fit.engine import fit_collected
from liftkit.fit.folds import FoldedMoments
from liftkit.fit.jacobian import directional_derivative, fit_jacobian, mean_jacobian
from liftkit.fit.pairs import EncodedImages, normal_latents
from liftkit.fit.pca import fit_pca
from liftkit.fit.procrustes import polar
from liftkit.fit.scale import scales
from liftkit.fit.stream import Collection
from liftkit.lift import Lift, principal_angles
from liftkit.options import FitOptions
from tests import tiny
from tests.klein import demo_source, fitted, latent_space
from tests.test_fit import moments, tokens

Cli = Callable[..., tuple[int, str, str]]


def test_pca_agrees_with_scikit_learn() -> None:
    """On centered tokens our uncentered subspace is scikit-learn's; IncrementalPCA streams to nearly the same."""
    falling = 0.6 ** torch.arange(tiny.DIM, dtype=torch.float64)
    turned = torch.linalg.qr(torch.randn(tiny.DIM, tiny.DIM, dtype=torch.float64))[0]
    x = torch.randn(1, 2000, tiny.DIM, dtype=torch.float64) * falling @ turned
    x = x - x.mean(dim=1, keepdim=True)
    lift = fit_pca(moments((torch.randn(1, 2000, tiny.RANK), x)), rank=6)
    for oracle, degrees in ((PCA(6), 1e-4), (IncrementalPCA(6, batch_size=200), 5.0)):
        theirs = torch.from_numpy(oracle.fit(x[0].numpy()).components_.T.copy())
        assert principal_angles(lift.basis, theirs)[-1] < degrees
    assert (lift.rank, lift.scale, lift.latent_patch) == (6, 1.0, 1)


def test_pca_for_a_conversion_is_the_subspace_turned_onto_the_latents() -> None:
    found = moments(tokens(noise=0.8))
    free, turned = fit_pca(found, rank=tiny.RANK), fit_pca(found)
    assert principal_angles(free.basis, turned.basis)[-1] < 1e-4
    aligned = (found.cross * turned.basis.T).sum()
    for seed in range(10):
        rotation = torch.linalg.qr(
            torch.randn(tiny.RANK, tiny.RANK, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        )[0]
        assert (found.cross * (turned.basis @ rotation).T).sum() < aligned
    assert turned.figures["energy_captured"] >= liftkit.fit_procrustes(found).figures["energy_captured"]


def test_ranks_out_of_range() -> None:
    with pytest.raises(ValueError, match="rank 49 is out of range"):
        fit_pca(moments(tokens()), rank=49)


def test_both_scales() -> None:
    found = moments(tokens(noise=1.0))
    norm, lsq = liftkit.fit_procrustes(found), liftkit.fit_procrustes(found, scale="lsq")
    assert torch.equal(norm.basis, lsq.basis)
    z, x = tokens(noise=1.0)
    assert norm.scale == pytest.approx(((x @ norm.basis).norm() / z.norm()).item(), rel=1e-9)
    errors = [(x - factor * lsq.scale * z @ lsq.basis.T).norm().item() for factor in (0.99, 1.0, 1.01)]
    assert errors[1] < min(errors[0], errors[2])
    assert scales(norm.basis, found) == {"norm": norm.scale, "lsq": lsq.scale}


def linear_decoder(seed: int = 0) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """A decoder that maps each latent patch to its pixel patch by a matrix."""
    matrix = torch.randn(tiny.DIM, tiny.RANK, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

    def decode(latents: torch.Tensor) -> torch.Tensor:
        height, width = (size * tiny.FACTOR for size in latents.shape[-2:])
        pixels = liftkit.patchify(latents, 2) @ matrix.T.to(latents) + 0.3
        return liftkit.unpatchify(pixels, tiny.PATCH, height, width)

    return matrix, decode


def test_jacobian_of_a_linear_decoder_is_its_polar_factor() -> None:
    matrix, decode = linear_decoder()
    jacobian = mean_jacobian(decode, torch.randn(3, 4, 6, 10, dtype=torch.float64), 2)
    torch.testing.assert_close(jacobian, matrix, rtol=1e-6, atol=1e-6)
    lift = fit_jacobian(jacobian)
    torch.testing.assert_close(lift.basis, polar(matrix), rtol=1e-6, atol=1e-6)
    assert lift.scale == pytest.approx((torch.linalg.svdvals(matrix).mean()).item(), rel=1e-6)


def test_neighbors_leak_little() -> None:
    """A decoder whose patches also see their neighbors: probes are spaced and signed, so that the mean is their own."""
    matrix, decode = linear_decoder()
    blur = torch.full((3, 1, 1, 7), 1 / 7, dtype=torch.float64)

    def smeared(latents: torch.Tensor) -> torch.Tensor:
        x = decode(latents) - 0.3
        return torch.nn.functional.conv2d(x, blur, padding=(0, 3), groups=3)

    jacobian = mean_jacobian(
        smeared, torch.randn(24, 4, 12, 12, dtype=torch.float64), 2, generator=torch.Generator().manual_seed(0)
    )
    own = torch.zeros_like(matrix)
    for number in range(tiny.RANK):
        tokens_ = torch.zeros(1, 36, tiny.RANK, dtype=torch.float64)
        tokens_[0, 14, number] = 1.0
        moved = smeared(liftkit.unpatchify(tokens_, 2, 12, 12))
        own[:, number] = liftkit.patchify(moved, tiny.PATCH)[0, 14]
    assert (jacobian - own).norm() / own.norm() < 0.1


def test_operators_without_forward_mode_fall_back_to_reverse() -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

        @staticmethod
        def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
            return 2 * gradient

    x, v = torch.randn(2, 5, dtype=torch.float64)
    found = directional_derivative(lambda value: Double.apply(value) ** 2, x, v)
    torch.testing.assert_close(found, 8 * x * v)


def test_jacobian_fit_needs_no_images() -> None:
    source = normal_latents(latent_space(), 32, 12, seed=0)
    lift = fitted(source, kind="jacobian", latents="normal")
    assert (lift.rank, lift.dim) == (32, 192)
    assert lift.figures["alignment"]["source"]["source"] == "normal latents"
    again = next(iter(source.pairs(range(3, 5))))
    assert torch.equal(again[1], torch.cat([source.draw(3), source.draw(4)]))


def test_angles_of_known_subspaces() -> None:
    eye = torch.eye(6, dtype=torch.float64)
    turned = eye.clone()
    angle = math.radians(30)
    turned[:, 0] = math.cos(angle) * eye[:, 0] + math.sin(angle) * eye[:, 3]
    a, b = eye[:, :2], turned[:, :2]
    assert principal_angles(a, b) == pytest.approx([0, 30], abs=1e-5)
    assert energy_angle(a, b, torch.diag(torch.tensor([1.0, 0, 0, 0, 0, 0], dtype=torch.float64))) == pytest.approx(30)
    assert energy_angle(a, b, torch.diag(torch.tensor([0, 1.0, 0, 0, 0, 0], dtype=torch.float64))) == pytest.approx(
        0, abs=1e-5
    )
    assert lift_angle(a, b, torch.diag(torch.tensor([1.0, 0], dtype=torch.float64))) == pytest.approx(30)
    assert lift_angle(a, -a, torch.eye(2, dtype=torch.float64)) == pytest.approx(180)


def test_color_auto_says_what_it_took_and_why() -> None:
    lift = fitted(demo_source(24), color="auto")
    assert "R^2 of pixels in oklab" in lift.figures["alignment"]["color_reason"]
    assert lift.color == fitted(demo_source(24), color="oklab").color, "sRGB is not clearly better here"
    assert fitted(demo_source(24), color="oklab-paper").color == Oklab()
    assert isinstance(fitted(demo_source(24), color="srgb").color, SRGB)


@pytest.mark.parametrize("better", ["oklab", "srgb"])
def test_color_auto_takes_a_clearly_better_space(better: str) -> None:
    folds = {}
    for name in ("oklab", "srgb"):
        z, x = tokens(100)
        folds[name] = FoldedMoments(tiny.RANK, tiny.DIM)
        for index in range(5):
            shown = x if name == better else torch.randn_like(x)
            folds[name].update(z, shown, torch.tensor([index]))
    assert fit_collected(Collection(folds), FitOptions(color="auto"), 2).color.name == better


def test_figures_are_held_out() -> None:
    """On tokens that have nothing to do with each other, no held-out map explains anything."""
    folded = FoldedMoments(tiny.RANK, tiny.DIM)
    z, x = torch.randn(5, 64, tiny.RANK), torch.randn(5, 64, tiny.DIM)
    folded.update(z, x, torch.arange(5))
    report = engine.alignment(folded, liftkit.fit_procrustes)
    for name in ("r2_latents", "r2_pixels_linear", "r2_pixels_lsq"):
        assert report["figures"][name]["value"] < 0.02, name
    assert max(report["channels"]["latents"]) < 0.05


def test_channels_have_a_spread_over_folds() -> None:
    folded = FoldedMoments(tiny.RANK, tiny.DIM)
    z = torch.randn(10, 64, tiny.RANK)
    x = z @ torch.randn(tiny.RANK, tiny.DIM) + 0.3 * torch.randn(10, 64, tiny.DIM)
    folded.update(z, x, torch.arange(10))
    channels = engine.alignment(folded, liftkit.fit_procrustes)["channels"]
    rows = [pixel_r2(liftkit.fit_procrustes(rest), fold, rest)[0] for rest, fold in folded.splits()]
    torch.testing.assert_close(torch.tensor(channels["colors_lift"]).double(), torch.stack(rows).mean(dim=0).double())
    expected = torch.stack(rows).std(dim=0).double()
    torch.testing.assert_close(torch.tensor(channels["spread"]["colors_lift"]).double(), expected, rtol=1e-5, atol=0)
    for name in ("latents", "colors_lift", "colors_linear"):
        assert len(channels["spread"][name]) == len(channels[name])


def test_one_image_and_one_color_everywhere(cli: Cli, tmp_path: Path) -> None:
    with pytest.raises(liftkit.UsageError, match="one image cannot be held out"):
        fitted(demo_source(1))
    from PIL import Image

    for index in range(3):
        Image.new("RGB", (64, 64), "teal").save(tmp_path / f"{index}.png")
    source = EncodedImages(latent_space(), ImageFolder(tmp_path), 64, 2)
    with pytest.raises(liftkit.UsageError, match="one color"):
        fitted(source)
    code, _, err = cli("fit", TINY_KLEIN, "--images", tmp_path, "-o", tmp_path / "l.safetensors", "--device", "cpu")
    assert code == 2
    assert "one color" in err


@pytest.mark.parametrize("kind", ["procrustes", "jacobian"])
def test_latents_of_the_model_itself(cli: Cli, tmp_path: Path, kind: str) -> None:
    (tmp_path / "prompts.txt").write_text("a red seven on flower petals\n\na cyan four on a temple roof\n")
    code, _, err = cli(
        "fit", TINY_KLEIN, "--latents", "model", "--prompts", tmp_path / "prompts.txt", "--num-images", 8,
        "--kind", kind, "-o", tmp_path / "lift.safetensors", "--device", "cpu",
    )  # fmt: skip
    assert code == 0, err
    source = Lift.load(tmp_path / "lift.safetensors").figures["alignment"]["source"]
    assert (source["source"], source["prompts"], source["used"]) == ("model samples", 2, 8)
