"""The oracle of the demonstration data: which digit, color and background does an image show?

A small convolutional network, trained on real composites by ``make tiny-klein`` and shipped with
liftkit. Its figures on held-out composites stand in tiny-klein's model card.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liftkit.data.demo import BACKGROUNDS, COLORS, DIGITS, Scene

WEIGHTS = "oracle.safetensors"


class Verdicts(NamedTuple):
    """Fraction of images, in [0, 1], that show what their prompt asks for."""

    digit: float
    color: float
    background: float


class Oracle(nn.Module):
    """Classifies (B, 3, 64, 64) images in [-1, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList()
        for inputs, outputs in ((3, 24), (24, 48), (48, 96), (96, 96)):
            self.convolutions.append(nn.Conv2d(inputs, outputs, 3, padding=1))
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for width in (24, 48, 96, 96))
        self.hidden = nn.Linear(96 * 16, 64)
        self.digit = nn.Linear(64, len(DIGITS))
        self.color = nn.Linear(64, len(COLORS))
        self.background = nn.Linear(64, len(BACKGROUNDS))

    def features(self, images: Tensor) -> Tensor:
        """Penultimate features (B, 64), for Frechet distances."""
        for convolution, norm in zip(self.convolutions, self.norms):
            images = F.max_pool2d(F.silu(norm(convolution(images))), 2)
        return F.silu(self.hidden(images.flatten(1)))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of digit (B, 10), color (B, 8) and background (B, 2)."""
        features = self.features(images)
        return self.digit(features), self.color(features), self.background(features)


def load_oracle() -> Oracle:
    """The shipped oracle, in float32 and evaluation mode."""
    from safetensors.torch import load_file

    oracle = Oracle()
    weights = load_file(str(files("liftkit") / "assets" / WEIGHTS))
    oracle.load_state_dict({key: value.float() for key, value in weights.items()})
    return oracle.eval().requires_grad_(False)


@torch.no_grad()
def judge(oracle: Oracle, images: Tensor, scenes: Sequence[Scene]) -> Verdicts:
    """How many images obey their prompts.

    Args:
        images: (B, 3, 64, 64) in [-1, 1].
        scenes: what each was asked to show.
    """
    wanted = torch.tensor([(scene.digit, scene.color, scene.background) for scene in scenes])
    correct = []
    for part, target in zip(images.split(256), wanted.split(256)):
        answers = torch.stack([logits.argmax(dim=1) for logits in oracle(part)], dim=1)
        correct.append(answers == target)
    return Verdicts(*torch.cat(correct).float().mean(dim=0).tolist())
