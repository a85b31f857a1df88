"""The figures of a comparison: known answers, and which way each moves."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from liftkit.color import to_signed, to_uint8
from liftkit.data import demo
from liftkit.evaluate import controls, figures, patches
from liftkit.evaluate.controls import choose, filtered
from liftkit.evaluate.detail import (
    detail,
    gradient_quantiles,
    laplacian_variance,
    patch_grid,
    radial_spectrum,
    spectrum_difference,
)
from liftkit.evaluate.features import texture_features
from liftkit.evaluate.figures import ENOUGH, FIGURES, Scorer
from liftkit.evaluate.metrics import METRICS
from liftkit.evaluate.patches import gaussian, patch_frechet, patch_gaussian, unsharp
from liftkit.evaluate.verdict import judge


def real(count: int, start: int = 0) -> tuple[Tensor, list[demo.Scene]]:
    drawn, scenes = demo.images(count, split="heldout", start=start)
    return to_signed(torch.from_numpy(drawn).permute(0, 3, 1, 2)), scenes


@pytest.fixture(scope="module")
def photographs() -> tuple[Tensor, Tensor]:
    """Two disjoint sets of real images."""
    both, _ = real(192)
    return both[:96], both[96:]


def noise(*shape: int, std: float = 0.1) -> Tensor:
    return std * torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def test_the_spectrum_of_white_noise_is_its_variance_at_every_radius() -> None:
    spectrum = radial_spectrum(noise(256, 3, 32, 32, std=0.2))
    assert spectrum.shape == (16,)
    # The innermost rings hold few frequencies, and lose some of their energy with the mean.
    assert torch.allclose(spectrum[2:], torch.full((14,), 0.04, dtype=torch.float64), rtol=0.06)
    assert torch.allclose(spectrum_difference(2 * spectrum, spectrum), torch.full((16,), 3.0103, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(32, 32), (32, 48), (48, 32)])
def test_the_spectrum_of_a_wave_is_at_its_frequency(shape: tuple[int, int]) -> None:
    """In cycles per shorter side, whatever the direction and the aspect."""
    rows, columns = torch.meshgrid(torch.arange(shape[0]) / 32, torch.arange(shape[1]) / 32, indexing="ij")
    for phase in (9 * rows, 9 * columns):
        wave = torch.sin(2 * math.pi * phase).expand(1, 3, *shape)
        assert radial_spectrum(wave).argmax().item() + 1 == 9


def test_the_laplacian_of_white_noise_has_twenty_times_its_variance() -> None:
    assert laplacian_variance(noise(64, 3, 32, 32)) == pytest.approx(20 * 0.01, rel=0.02)


def test_gradient_quantiles_are_those_of_the_grey_image() -> None:
    ramp = torch.linspace(-1, 1, 33).expand(2, 3, 33, 33)
    assert gradient_quantiles(ramp, (0.1, 0.5, 0.97)) == pytest.approx([1 / 16] * 3, abs=5e-5)
    gray = noise(8, 1, 33, 33).expand(-1, 3, -1, -1)
    down, right = gray[:, 0].diff(dim=1)[:, :, :-1], gray[:, 0].diff(dim=2)[:, :-1]
    expected = torch.hypot(down, right).flatten().quantile(torch.tensor([0.5, 0.97]))
    assert gradient_quantiles(gray, (0.5, 0.97)) == pytest.approx(expected.tolist(), abs=2e-3)


def test_the_patch_grid_shows_in_patches_alone(photographs: tuple[Tensor, Tensor]) -> None:
    images, _ = photographs
    blocks = noise(96, 3, 8, 8).repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
    assert patch_grid(images, 8) == pytest.approx(1.0, abs=0.1)
    assert patch_grid(images + blocks, 8) > 1.3
    assert patch_grid(torch.zeros(2, 3, 16, 16), 8) == 1.0


def test_statistics_do_not_depend_on_batches(photographs: tuple[Tensor, Tensor]) -> None:
    images, _ = photographs
    one, whole = [detail(part, 8) for part in images.split(24)], detail(images, 8)
    assert torch.allclose(torch.stack([part.spectrum for part in one]).mean(dim=0), whole.spectrum)
    assert sum(part.patch_grid for part in one) / 4 == pytest.approx(whole.patch_grid, rel=0.05)


def test_8_bit_images_have_the_same_figures(photographs: tuple[Tensor, Tensor]) -> None:
    images, reference = photographs
    exact, stored = detail(images, 8), detail(to_uint8(images), 8)
    assert torch.allclose(exact.spectrum, stored.spectrum)
    assert exact[1:] == pytest.approx(stored[1:])
    assert torch.equal(texture_features(images), texture_features(to_uint8(images)))
    assert patch_frechet(images, reference) == patch_frechet(to_uint8(images), to_uint8(reference))


def test_texture_features_see_no_plain_color_and_order_degradations(photographs: tuple[Tensor, Tensor]) -> None:
    a, b = photographs
    plain = texture_features(torch.rand(4, 3, 1, 1).expand(-1, -1, 32, 32) * 2 - 1)
    assert plain.shape == (4, sum(width for width in (24, 32, 40)))
    assert plain.abs().max() < 1e-5
    assert torch.equal(texture_features(a), texture_features(a))
    reference = texture_features(b)
    floor, sharp, sharper = (
        patches.frechet(gaussian(texture_features(images)), gaussian(reference))
        for images in (a, unsharp(a, 0.5), unsharp(a, 1.0))
    )
    assert 3 * floor < sharp < sharper


def test_large_sets_take_every_kth_patch(photographs: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = patch_gaussian(photographs[0])
    monkeypatch.setattr(patches, "MOST_PATCHES", 2000)
    part = patch_gaussian(photographs[0])
    assert patches.frechet(part, whole) < 0.1 * whole.covariance.trace()
    assert not torch.equal(part.covariance, whole.covariance)


@pytest.mark.parametrize(
    ("name", "better", "worse"),
    [
        ("digit", 0.9, 0.8),
        ("patch_frechet", 0.1, 0.2),
        ("spectrum", 0.5, 1.0),
        ("spectrum_high", -0.5, 1.0),
        ("laplacian", 1.2, 0.5),
        ("gradient_median", 0.9, 1.6),
        ("two_sample", 0.52, 0.6),
    ],
)
def test_costs_put_the_better_value_first(name: str, better: float, worse: float) -> None:
    figure = FIGURES[name]
    assert figure.cost(better) + figure.tolerance(ENOUGH) < figure.cost(worse)


def test_chance_is_as_good_as_it_gets_and_ratios_are_symmetric() -> None:
    assert FIGURES["two_sample"].cost(0.46) == FIGURES["two_sample"].cost(0.5) == 0
    assert FIGURES["laplacian"].cost(0.5) == pytest.approx(FIGURES["laplacian"].cost(2.0))
    assert FIGURES["digit"].tolerance(128) == 2 * FIGURES["digit"].tolerance(512)


@pytest.fixture(scope="module")
def scores() -> dict[str, dict[str, float | None]]:
    """Figures of real images, and of what was done to them."""
    patch = pytest.MonkeyPatch()
    patch.setattr(figures, "ENOUGH", 96)
    patch.setattr(figures, "two_sample_accuracy", lambda images, reference, seed, steps: 0.5 + seed / 10)
    images, scenes = real(96)
    scorer = Scorer(real(128, start=500)[0], patch=8, scenes=scenes, seeds=(0, 1))
    blocks = noise(96, 3, 8, 8).repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
    sets = {
        "real": images,
        "blurred": unsharp(images, -0.8),
        "noisy": filtered("noise", images, 0.1),
        "blocks": (images + blocks).clamp(-1, 1),
        "others": images.roll(1, dims=0),
    }
    found = {name: scorer.score(part).figures for name, part in sets.items()}
    patch.undo()
    return found


def test_every_figure_is_there_and_real_images_score_well(scores: dict[str, dict[str, float | None]]) -> None:
    assert list(scores["real"]) == list(FIGURES)
    real_scores = {name: value for name, value in scores["real"].items() if value is not None}
    assert FIGURES.keys() - real_scores.keys() == METRICS.keys(), (
        "those that papers print are only there when asked for"
    )
    assert min(real_scores[name] for name in ("digit", "color", "background")) > 0.9
    assert all(0.8 < real_scores[name] < 1.25 for name in real_scores if FIGURES[name].kind == "ratio")
    assert real_scores["spectrum"] < 0.7
    assert real_scores["two_sample"] == pytest.approx(0.55), "the mean over seeds"


@pytest.mark.parametrize(
    ("damage", "hurt"),
    [
        ("blurred", ("texture_frechet", "patch_frechet", "spectrum", "spectrum_high", "laplacian", "gradient_edges")),
        ("noisy", ("patch_frechet", "spectrum", "laplacian", "gradient_median")),
        ("blocks", ("patch_grid",)),
        ("others", ("digit", "color", "background")),
    ],
)
def test_each_damage_shows(scores: dict[str, dict[str, float | None]], damage: str, hurt: tuple[str, ...]) -> None:
    for name in hurt:
        spoiled, whole = scores[damage][name], scores["real"][name]
        assert spoiled is not None
        assert whole is not None
        assert FIGURES[name].cost(spoiled) > FIGURES[name].cost(whole) + FIGURES[name].tolerance(96), name


def test_the_wrong_prompts_change_nothing_but_obedience(scores: dict[str, dict[str, float | None]]) -> None:
    assert scores["others"]["patch_frechet"] == pytest.approx(scores["real"]["patch_frechet"], rel=1e-6)
    assert scores["others"]["laplacian"] == pytest.approx(scores["real"]["laplacian"], rel=1e-6)


def test_frechet_distances_of_few_samples_are_refused() -> None:
    images, scenes = real(16)
    few = Scorer(images, patch=8, scenes=scenes, steps=1, seeds=(0,)).score(images).figures
    missing = {name for name, value in few.items() if value is None}
    assert missing - METRICS.keys() == {"oracle_frechet", "texture_frechet", "patch_frechet"}
    strange = Scorer(images, patch=8, steps=1, seeds=(0,)).score(images).figures
    assert strange["digit"] is None


def test_the_best_filter_mends_what_it_can(photographs: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controls, "two_sample_accuracy", lambda images, reference, steps: 0.6)
    a, b = photographs
    blurred = unsharp(a, -0.5)
    chosen = choose("unsharp", blurred, b)
    assert patch_frechet(unsharp(blurred, chosen.amount), b) < 0.8 * patch_frechet(blurred, b)
    assert chosen.amount >= 0.5
    assert choose("noise", a, b).amount == min(controls.AMOUNTS["noise"]), "real images need no noise"


def test_the_two_sample_test_decides_between_the_finalists(
    photographs: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = photographs
    answers = iter([0.9, 0.6])
    monkeypatch.setattr(controls, "two_sample_accuracy", lambda images, reference, steps: next(answers))
    chosen = choose("noise", a, b)
    tried = {float(amount): trial["two_sample"] for amount, trial in chosen.trials.items() if "two_sample" in trial}
    assert tried == {0.01: 0.9, 0.02: 0.6}
    assert chosen.amount == 0.02


LABELS = {"vae": "real through the VAE", "base": "latent base", "unsharp": "base + unsharp mask"}


def figures_like(**changes: float) -> dict[str, float | None]:
    base = dict.fromkeys(FIGURES, 1.0) | {"patch_frechet": 0.2, "two_sample": 0.6, "spectrum_high": -2.0}
    return {**base, **changes}


def test_a_claim_needs_every_control() -> None:
    good = figures_like(patch_frechet=0.1, two_sample=0.55)
    beaten = {"vae": figures_like(), "base": figures_like(two_sample=0.56)}
    found = judge("pixel-1", "mine", good, beaten, {key: LABELS[key] for key in beaten}, 512)
    assert found.claims == ["patch_frechet"]
    assert found.standings["two_sample"].beats == ["vae"]
    assert found.standings["two_sample"].level == ["base"], "within what two seeds make"
    assert found.text.startswith("mine improves on all controls in Frechet distance (patches);")


def test_a_missing_control_forbids_the_claim() -> None:
    good = figures_like(patch_frechet=0.1)
    found = judge(
        "pixel-1", "mine", good, {"base": figures_like()}, {"base": "latent base", "scratch": "random weights"}, 512
    )
    assert (found.claims, found.partial, found.missing) == ([], ["patch_frechet"], ["scratch"])
    assert found.text == (
        "mine improves on all given controls in Frechet distance (patches). "
        "Nothing is claimed without the controls that were not given: random weights."
    )


def test_no_claim_where_one_control_is_better() -> None:
    good = figures_like(patch_frechet=0.1)
    rivals = {"base": figures_like(), "unsharp": figures_like(patch_frechet=0.05)}
    found = judge("pixel-1", "mine", good, rivals, {key: LABELS[key] for key in rivals}, 512)
    assert not found.claims
    assert found.standings["patch_frechet"].behind == ["unsharp"]
    assert found.text == (
        "No figure of mine improves on all controls. It beats some: latent base (Frechet distance (patches))."
    )
    worst = judge("pixel-1", "mine", figures_like(patch_frechet=0.4), rivals, {key: LABELS[key] for key in rivals}, 512)
    assert worst.text == "No figure of mine improves on any control."


def test_figures_that_do_not_apply_are_left_out_of_verdicts() -> None:
    good = figures_like(patch_frechet=0.1) | {"digit": None}
    found = judge("pixel-1", "mine", good, {"base": figures_like() | {"digit": None}}, LABELS, 512)
    assert "digit" not in found.standings
