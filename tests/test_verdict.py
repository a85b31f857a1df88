"""The verdict on real and on spoiled latents, what it says, and figures that are not finite."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import liftkit
from liftkit.data.images import DemoImages
from liftkit.fit.alignment import Fit, alignment, alignment_kept, top_eigenvectors
from liftkit.fit.engine import Convergence, fit_collected, fit_pass
from liftkit.fit.folds import FoldedMoments
from liftkit.fit.moments import TokenMoments
from liftkit.fit.pairs import EncodedImages
from liftkit.fit.procrustes import fit_procrustes
from liftkit.fit.scale import scaled_lift
from liftkit.fit.stream import Collection
from liftkit.fit.verdict import THRESHOLDS, share, verdict
from liftkit.models.latents import LatentSpace
from liftkit.options import FitOptions
from liftkit.progress import Silent
from tests.klein import demo_source, fitted, latent_space
from tests.real import flux2_encoder, flux2_moments, sana_encoder


def weak(judged: dict[str, Any]) -> set[str]:
    return {reason["figure"] for reason in judged["reasons"] if reason["level"] != "good"}


def flux2(change: Callable[[TokenMoments], TokenMoments] = lambda moments: moments) -> FoldedMoments:
    """Two disjoint halves of 903 photographs."""
    folded = FoldedMoments(128, 768, 2)
    folded.folds = [change(flux2_moments(name)) for name in ("imagenet_a", "imagenet_b")]
    return folded


def shuffled(moments: TokenMoments) -> TokenMoments:
    """The same tokens in pairs that have nothing to do with each other: their means meet, and noise."""
    result, n = copy.copy(moments), moments.count
    generator = torch.Generator().manual_seed(n)

    def root(gram: Tensor, total: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(gram / n - torch.outer(total, total) / n**2)
        return vectors * values.clamp(min=0).sqrt()

    noise = torch.randn(moments.cross.shape, dtype=torch.float64, generator=generator)
    latents, pixels = (
        root(moments.latent_gram, moments.latent_sum),
        root(moments.pixel_gram, moments.pixel_sum),
    )
    result.cross = torch.outer(moments.latent_sum, moments.pixel_sum) / n + n**0.5 * latents @ noise @ pixels.T
    return result


def random_rotation(moments: TokenMoments) -> liftkit.Lift:
    """The best subspace, and any rotation inside it."""
    generator = torch.Generator().manual_seed(1)
    rotation = torch.linalg.qr(torch.randn(128, 128, dtype=torch.float64, generator=generator))[0]
    basis = top_eigenvectors(moments.pixel_gram, 128) @ rotation
    return scaled_lift(basis, moments, kind="random", latent_patch=2, color=None, rule="norm")


@pytest.mark.parametrize(
    ("change", "fit", "level", "expected"),
    [
        (lambda moments: moments, fit_procrustes, "usable", {"cosine"}),
        (shuffled, fit_procrustes, "poor", {"r2_pixels_linear", "cosine", "alignment_kept"}),
        (lambda moments: moments, random_rotation, "poor", {"cosine"}),
    ],
    ids=["sound", "shuffled", "random rotation"],
)
def test_flux2(change: Callable[[TokenMoments], TokenMoments], fit: Fit, level: str, expected: set[str]) -> None:
    report = alignment(flux2(change), fit)
    judged = verdict({**report, "pictures": None})
    assert judged["level"] == level
    assert expected <= weak(judged)
    assert level == "poor" or expected == weak(judged)


def test_flux2_has_the_figures_that_were_published_with_its_moments() -> None:
    report = alignment(flux2(), fit_procrustes)["figures"]
    assert report["alignment_kept"]["value"] == pytest.approx(0.989, abs=5e-4)
    assert report["cosine"]["value"] == pytest.approx(0.33, abs=5e-3)
    assert 0.01 < report["cosine_chance"]["value"] < 0.02
    assert report["scale"]["fitted"] == pytest.approx(2.093, abs=1e-3)
    assert report["latent_rms"]["value"] == pytest.approx(1.0, abs=0.01)


def test_a_fit_of_flux2_has_converged() -> None:
    reached = Convergence(2, Silent())
    assert reached(Collection({"oklab": flux2()}))
    assert not Convergence(2, Silent())(Collection({"oklab": flux2(shuffled)}))


class Crops:
    """Crops of two photographs that come with scikit-learn."""

    skipped = ""

    def __len__(self) -> int:
        return 64

    def images(self, resolution: int, multiple: int, which: range | None = None) -> Iterator[tuple[int, Tensor]]:
        from sklearn.datasets import load_sample_images

        photographs = [torch.tensor(image).permute(2, 0, 1) for image in load_sample_images().images]
        for place in which or range(64):
            generator = torch.Generator().manual_seed(place)
            top, left = (int(torch.randint(0, size, (), generator=generator)) for size in (427 - 128, 640 - 128))
            yield place, photographs[place % 2][:, top : top + 128, left : left + 128]

    def describe(self) -> dict[str, Any]:
        return {"source": "crops"}


@pytest.mark.slow
@pytest.mark.parametrize(("space", "patch"), [(flux2_encoder, 2), (sana_encoder, 1)])
def test_real_encoders(space: Callable[[], Any], patch: int) -> None:
    """Latents of photographs are worth a finetune; those of other photographs are not."""

    class Rolled(EncodedImages):
        def pairs(self, which: range) -> Iterator[Any]:
            for places, latents, images in super().pairs(which):
                yield places, latents.roll(1, 0), images

    levels = []
    # Sana's pixel tokens have 3,072 numbers, of which every fold takes eigenvalues: minutes, so once.
    for kind in (EncodedImages, Rolled) if patch == 2 else (EncodedImages,):
        source = kind(space(), Crops(), 128, patch)  # type: ignore[arg-type]
        lift = fit_collected(fit_pass(source, FitOptions(), patch), FitOptions(), patch)
        levels.append(lift.figures["alignment"]["verdict"]["level"])
    assert levels[0] != "poor"
    assert levels[1:] in ([], ["poor"])


def whitened(tokens: int = 4000) -> FoldedMoments:
    """Latents that are the principal components of pixels, each of variance 1, turned: no rotation fits them well,
    a linear map does, as in FLUX.2."""
    generator = torch.Generator().manual_seed(0)
    folded = FoldedMoments(16, 48)
    falling = 0.7 ** torch.arange(48, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64, generator=generator))[0]
    spatial = torch.linalg.qr(torch.randn(48, 48, dtype=torch.float64, generator=generator))[0]
    for fold in range(5):
        parts = torch.randn(1, tokens, 48, dtype=torch.float64, generator=generator)
        folded.update(parts[..., :16] @ turn, parts * falling @ spatial, torch.tensor([fold]))
    return folded


def test_latents_that_a_linear_map_carries_and_no_rotation_does_are_usable() -> None:
    report = alignment(whitened(), fit_procrustes)
    assert report["figures"]["r2_pixels_linear"]["value"] > 0.9
    assert report["figures"]["r2_pixels"]["value"] < 0.4
    assert verdict({**report, "pictures": None})["level"] in ("good", "usable")


def without_normalization() -> LatentSpace:
    space = LatentSpace(copy.deepcopy(latent_space().vae))
    space.vae.bn.running_var.fill_(1)
    space.vae.bn.running_mean.zero_()
    return space


def without_channel(channel: int) -> LatentSpace:
    space = LatentSpace(copy.deepcopy(latent_space().vae))
    last = space.vae.quant_conv or space.vae.encoder.conv_out
    last.weight[channel] = 0
    last.bias[channel] = 0
    return space


def test_a_missing_normalization_and_a_dead_channel_are_named() -> None:
    judged = fitted(demo_source(48, without_normalization())).figures["alignment"]["verdict"]
    assert judged["level"] == "usable"
    assert "latent_size" in weak(judged)
    assert any("normalization" in advice for advice in judged["advice"])
    judged = fitted(demo_source(48, without_channel(3))).figures["alignment"]["verdict"]
    assert judged["level"] == "poor"
    assert "Latent channel 3 hardly varies" in judged["text"]


def test_bounds_stand_beside_figures_and_advice_once() -> None:
    judged = fitted(demo_source(16)).figures["alignment"]["verdict"]
    assert judged["level"] == "usable"
    assert judged["text"].startswith("Usable. Too few images")
    assert "(good: above 0.97)" in judged["text"]
    assert judged["advice"] == ["Use more images, or more varied ones, than these 16."]
    report = alignment(whitened(), fit_procrustes)
    for name in ("r2_pixels_linear", "cosine", "alignment_kept", "r2_pixels"):
        report["figures"][name] |= {"value": -0.3, "fitted": -0.3}
    judged = verdict({**report, "pictures": {"psnr": {"vae": 12.0}, "patch_grid": {"lift": 2.0, "vae": 1.0}}})
    assert judged["level"] == "poor"
    assert len(judged["advice"]) == len(set(judged["advice"]))
    assert "explains none of the pixel variance (good: above 70%)" in judged["text"]
    assert "-30" not in judged["text"]
    assert judged["text"].count("(good: ") == len(weak(judged))


@pytest.mark.parametrize("figure", [each.figure for each in THRESHOLDS])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_poor(figure: str, value: float) -> None:
    threshold = next(each for each in THRESHOLDS if each.figure == figure)
    assert threshold.level(value) == "poor"
    assert [threshold.level(each) for each in (threshold.good, threshold.poor)] == ["good", "usable"]
    report = {
        **alignment(whitened(200), fit_procrustes),
        "pictures": {"psnr": {"vae": 30.0}, "patch_grid": {"lift": 1.0, "vae": 1.0}},
    }
    if figure in report["figures"]:
        report["figures"][figure]["value"] = value
    elif figure == "vae_psnr":
        report["pictures"]["psnr"]["vae"] = value
    elif figure == "latent_size":
        report["figures"]["latent_rms"]["value"] = value
    else:
        report["channels"]["latents_std"][2] = value
    judged = verdict(report)
    assert judged["level"] == "poor", judged["text"]
    assert figure in weak(judged)


def test_a_decoder_that_makes_nan_stops_the_fit() -> None:
    space = LatentSpace(copy.deepcopy(latent_space().vae))
    space.vae.decoder.conv_out.bias[0] = torch.nan
    with pytest.raises(liftkit.UsageError, match="decoder makes NaN"):
        fitted(demo_source(12, space))


def test_alignment_kept_of_known_halves() -> None:
    folded = whitened()
    kept = alignment_kept(folded, fit_procrustes)
    assert len(kept) == 10
    assert 0.95 < min(kept) <= max(kept) <= 1
    parts = [sum_of(folded.folds[:2]), sum_of(folded.folds[2:])]
    own, other = (fit_procrustes(part).basis for part in parts)
    expected = (parts[0].cross * other.T).sum() / (parts[0].cross * own.T).sum()
    assert kept[0] == pytest.approx(expected.item(), rel=1e-9)
    folded.folds[3] = folded.folds[4] = TokenMoments(16, 48)
    assert len(alignment_kept(folded, fit_procrustes)) == 6
    folded.folds[2] = TokenMoments(16, 48)
    assert len(alignment_kept(folded, fit_procrustes)) == 2


def sum_of(moments: list[TokenMoments]) -> TokenMoments:
    total = moments[0]
    for each in moments[1:]:
        total = total + each
    return total


def test_shares_in_words() -> None:
    assert [share(value) for value in (0.345, 0.0, -0.84, float("nan"))] == ["34%", "none", "none", "none"]


def test_demo_images_converge_soon() -> None:
    source = EncodedImages(latent_space(), DemoImages(512), 64, 2)
    assert fit_pass(source, FitOptions(num_images="auto"), 2).any.total.images <= 128
