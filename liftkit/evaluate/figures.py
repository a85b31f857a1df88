"""The figures of a comparison: what each means, when one is better than another, and how a set of images is scored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log
from typing import Literal

import torch
from torch import Tensor

from liftkit.data import demo
from liftkit.data.oracle import judge, load_oracle
from liftkit.evaluate.batches import batches
from liftkit.evaluate.detail import detail, spectrum_difference
from liftkit.evaluate.features import texture_features
from liftkit.evaluate.patches import PATCH, frechet, gaussian, patch_gaussian
from liftkit.evaluate.two_sample import CROP, two_sample_accuracy

ENOUGH = 512
"""Samples below which a Frechet distance says more of their number than of the model."""
STEPS, SEEDS = 400, (0, 1)
Kind = Literal["high", "score", "distance", "low", "zero", "ratio", "chance"]
# How far a value is from the best, on a scale where differences of one kind compare.
_COST: dict[Kind, Callable[[float], float]] = {
    "high": lambda value: -value,
    "score": lambda value: -value,
    "distance": lambda value: log(max(value, 1e-9)),
    "low": lambda value: value,
    "zero": abs,
    "ratio": lambda value: abs(log(max(value, 1e-9))),
    "chance": lambda value: max(value - 0.5, 0.0),
}
# Which values are better, for people.
_BETTER: dict[Kind, str] = {
    "high": "higher, up to 1",
    "score": "higher",
    "distance": "lower, down to 0",
    "low": "lower, down to 0",
    "zero": "closer to 0",
    "ratio": "closer to 1",
    "chance": "lower, down to 0.5",
}


@dataclass(frozen=True)
class Figure:
    """One figure.

    Args:
        label: for people.
        meaning: its definition, in a few words.
        kind: ``high``: larger is better, up to 1; ``score``: larger is better; ``distance``: a Frechet distance, compared
            by its logarithm; ``low``: smaller is better; ``zero``: near 0; ``ratio``: near 1, compared by its logarithm;
            ``chance``: 0.5 or below.
        noise: difference of two costs that two seeds of one model can make at 512 samples (docs/compare.md); None where nobody
            measured it, and no claim rests on the figure.
        digits: to print.
        measure: the figure of images (n, 3, H, W) in [-1, 1] or uint8, where :meth:`Scorer.score` does not know it by itself;
            the scorer has the ``reference`` images. None where the figure does not apply.
    """

    label: str
    meaning: str
    kind: Kind
    noise: float | None
    digits: int = 3
    measure: Callable[[Scorer, Tensor], float | None] | None = None

    def cost(self, value: float) -> float:
        """How far a value is from the best; smaller is better."""
        return _COST[self.kind](value)

    @property
    def better(self) -> str:
        """Which values are better, in words that follow "better:"."""
        return _BETTER[self.kind]

    def tolerance(self, count: int) -> float:
        """Difference of costs below which two values are level, for ``count`` samples; 0 where it is not known."""
        return (self.noise or 0.0) * (ENOUGH / count) ** 0.5

    def show(self, value: float | None) -> str:
        """A value for people."""
        return (
            "-" if value is None else f"{value:+.{self.digits}f}" if self.kind == "zero" else f"{value:.{self.digits}f}"
        )


FIGURES = {
    "digit": Figure("digit", "share of samples in which the oracle reads the prompted digit", "high", 0.02),
    "color": Figure("color", "the same, color", "high", 0.01),
    "background": Figure("background", "the same, background", "high", 0.01),
    "oracle_frechet": Figure("Frechet distance (oracle)", "of the oracle's 64 features", "distance", 0.2, 2),
    "texture_frechet": Figure(
        "Frechet distance (texture)", "of fixed random convolutional features, x 1000", "distance", 0.2, 2
    ),
    "patch_frechet": Figure("Frechet distance (patches)", "of mean-removed 8 x 8 patches", "distance", 0.1, 4),
    "two_sample": Figure(
        "two-sample accuracy", "held-out accuracy of a network telling 16 x 16 crops from real ones", "chance", 0.02
    ),
    "spectrum": Figure("spectrum", "mean size of the radial spectrum's difference, dB", "low", 0.15, 2),
    "spectrum_high": Figure("high frequencies", "mean difference in the spectrum's upper half, dB", "zero", 0.2, 2),
    "laplacian": Figure("sharpness", "variance of the Laplacian over that of real images", "ratio", 0.03),
    "gradient_edges": Figure("edges", "97 % quantile of the gradient over that of real images", "ratio", 0.02),
    "gradient_median": Figure("grain", "median of the gradient over that of real images: flat areas", "ratio", 0.03),
    "patch_grid": Figure(
        "patch grid", "energy across patch borders over that inside, as a ratio to real images", "ratio", 0.02
    ),
    "fid": Figure("FID", "by Inception v3 of 2015-12-05, clean-fid's resize", "distance", None, 2),
    "fid-tf": Figure(
        "FID (TensorFlow's resize)", "the same with bilinear resizing as in torch-fidelity", "distance", None, 2
    ),
    "kid": Figure("KID", "by the same network as FID, unbiased, x 1000", "low", None, 3),
    "fd-dinov2": Figure("FD-DINOv2", "Frechet distance of class tokens of DINOv2 ViT-L/14", "distance", None, 1),
    "cmmd": Figure("CMMD", "MMD of embeddings by CLIP ViT-L/14 at 336", "low", None, 3),
    "clip": Figure("CLIP score", "mean cosine of image and prompt by CLIP ViT-L/14, x 100", "score", None, 2),
}
"""Every figure of a comparison by its key, in the order of the tables. Add one with a ``measure`` to have it everywhere."""


@dataclass(frozen=True)
class Score:
    """The figures of a set of images.

    Args:
        figures: by name, in the order of :data:`FIGURES`; None where one does not apply.
        spectrum: difference to the reference's radial spectrum in dB, one value per radius from 1.
    """

    figures: dict[str, float | None]
    spectrum: list[float]


class Scorer:
    """Scores sets of images against one reference, whose own statistics are taken once.

    Args:
        reference: real images (m, 3, H, W) in [-1, 1], or uint8.
        patch: side of a token's pixel patch.
        scenes: what image i of every set was asked to show, for the demo data's prompts; None for others, where the
            oracle's figures do not apply.
        steps, seeds: of the two-sample test; accuracies are averaged over the seeds.
    """

    def __init__(
        self,
        reference: Tensor,
        *,
        patch: int,
        scenes: Sequence[demo.Scene] | None = None,
        steps: int = STEPS,
        seeds: tuple[int, ...] = SEEDS,
    ) -> None:
        self.reference, self.patch, self.scenes, self.steps, self.seeds = reference, patch, scenes, steps, seeds
        self.detail = detail(reference, patch)
        self.texture = gaussian(texture_features(reference))
        self.patches = patch_gaussian(reference) if min(reference.shape[-2:]) >= PATCH else None
        self.oracle = load_oracle() if scenes is not None and reference.shape[-1] == demo.SIZE else None
        self.semantics = gaussian(self._features(reference)) if self.oracle is not None else None

    def score(self, images: Tensor) -> Score:
        """All figures of (n, 3, H, W) images in [-1, 1], or uint8; Frechet distances are None where n is below 512."""
        own = detail(images, self.patch)
        difference = spectrum_difference(own.spectrum, self.detail.spectrum)
        found: dict[str, float | None] = {
            **self._semantic(images),
            **self._distances(images),
            "two_sample": self._two_sample(images),
            "spectrum": difference.abs().mean().item(),
            "spectrum_high": difference[len(difference) // 2 :].mean().item(),
            "laplacian": _ratio(own.laplacian, self.detail.laplacian),
            "gradient_edges": _ratio(own.edges, self.detail.edges),
            "gradient_median": _ratio(own.grain, self.detail.grain),
            "patch_grid": _ratio(own.patch_grid, self.detail.patch_grid),
        }
        found |= {name: each.measure(self, images) for name, each in FIGURES.items() if each.measure is not None}
        return Score({name: found.get(name) for name in FIGURES}, difference.tolist())

    def _semantic(self, images: Tensor) -> dict[str, float]:
        """How many images show what their prompts ask for, as the demo's oracle reads them."""
        if self.oracle is None or self.scenes is None:
            return {}
        return judge(self.oracle, torch.cat(list(batches(images))), self.scenes[: len(images)])._asdict()

    def _distances(self, images: Tensor) -> dict[str, float]:
        if len(images) < ENOUGH:
            return {}
        found = {"texture_frechet": 1000.0 * frechet(gaussian(texture_features(images)), self.texture)}
        if self.patches is not None:
            found["patch_frechet"] = frechet(patch_gaussian(images), self.patches)
        if self.semantics is not None:
            found["oracle_frechet"] = frechet(gaussian(self._features(images)), self.semantics)
        return found

    def _two_sample(self, images: Tensor) -> float | None:
        if min(images.shape[-2:]) < CROP:
            return None
        found = [two_sample_accuracy(images, self.reference, seed=seed, steps=self.steps) for seed in self.seeds]
        return sum(found) / len(found)

    @torch.no_grad()
    def _features(self, images: Tensor) -> Tensor:
        assert self.oracle is not None
        return torch.cat([self.oracle.features(part) for part in batches(images)])


def _ratio(value: float, reference: float) -> float:
    """A floor far below one gray level keeps plain images at 1."""
    return (value + 1e-6) / (reference + 1e-6)
