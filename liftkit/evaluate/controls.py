"""Filters as controls that a pixel model has to beat before anything is claimed.

Second-order statistics can be gamed. An unsharp mask gives a blurred image the spectrum of a real one, and white noise
gives a smooth one its grain; neither adds any detail that was lost.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from liftkit.color import to_uint8
from liftkit.evaluate.batches import batches
from liftkit.evaluate.figures import FIGURES
from liftkit.evaluate.patches import patch_frechet, unsharp
from liftkit.evaluate.two_sample import two_sample_accuracy

AMOUNTS = {"unsharp": (0.125, 0.25, 0.5, 1.0), "noise": (0.01, 0.02, 0.04, 0.08)}
FINALISTS, TRIAL_STEPS = 2, 100


@dataclass(frozen=True)
class Choice:
    """The strength of a filter, and what spoke for it.

    Args:
        amount: the best one.
        trials: by amount, patch Frechet distance and, for the finalists, two-sample accuracy.
    """

    amount: float
    trials: dict[str, dict[str, float]]


def filtered(name: str, images: Tensor, amount: float) -> Tensor:
    """Images through a filter.

    Args:
        name: ``unsharp``, or ``noise`` for white noise that is always the same.
        images: (n, 3, H, W) in [-1, 1], or uint8.
        amount: of sharpening, or the noise's standard deviation.

    Returns:
        uint8.
    """
    generator = torch.Generator().manual_seed(0)
    parts = []
    for part in batches(images):
        grain = torch.randn(part.shape, generator=generator) if name == "noise" else None
        parts.append(to_uint8(unsharp(part, amount) if grain is None else part + amount * grain))
    return torch.cat(parts)


def choose(name: str, images: Tensor, validation: Tensor, steps: int = TRIAL_STEPS) -> Choice:
    """The best strength of a filter: the two amounts with the least patch Frechet distance, then the two-sample test.

    Where that test cannot tell the finalists apart, the smaller distance decides. Nothing else is scored against the
    validation images; that the images are half of the base's own row can only favor the control.

    Args:
        name: ``unsharp`` or ``noise``.
        images: of the base, (n, 3, H, W) in [-1, 1], or uint8.
        validation: real images, likewise.
        steps: of the two-sample test; 0 leaves the choice to the distance.
    """
    tried = {amount: filtered(name, images, amount) for amount in AMOUNTS[name]}
    trials = {amount: {"patch_frechet": patch_frechet(shown, validation)} for amount, shown in tried.items()}
    finalists = sorted(tried, key=lambda amount: trials[amount]["patch_frechet"])[:FINALISTS]
    best = finalists[0]
    if steps:
        for amount in finalists:
            trials[amount]["two_sample"] = two_sample_accuracy(tried[amount], validation, steps=steps)
        first, second = (FIGURES["two_sample"].cost(trials[amount]["two_sample"]) for amount in finalists)
        best = finalists[1] if second < first - FIGURES["two_sample"].tolerance(len(images)) else best
    return Choice(best, {str(amount): trial for amount, trial in trials.items()})
