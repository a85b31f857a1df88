"""A rank that the data decide: the directions of a token that images fill more than noise does.

Noise has variance 1 in every direction. Where the data's second moment is larger, a state at sigma = 1/2 is more data than
noise. Where it is smaller, most of what the network would have to hand through of the noise says nothing about the data, and to
predict the data is the easier task. So the rank is the number of eigenvalues of ``G_x`` per token above 1, in the units of the
color space. What the rule is worth was measured: docs/lab/ranks.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NOISE = 1.0
"""Variance of the noise in each direction."""


@dataclass(frozen=True)
class AutoRank:
    """A chosen rank.

    Args:
        rank: 0 to D.
        spectrum: second moments of tokens along their principal directions, falling, (D,).
    """

    rank: int
    spectrum: tuple[float, ...]

    @property
    def reason(self) -> str:
        """How it came about, for people."""
        last = f"the last has {self.spectrum[self.rank - 1]:.2f}" if self.rank else "none has"
        following = f", the next {self.spectrum[self.rank]:.2f}" if self.rank < len(self.spectrum) else ""
        return f"{self.rank} directions with more than the noise's variance of 1: {last}{following}"


def auto_rank(gram: Tensor, tokens: int) -> AutoRank:
    """The number of directions whose second moment exceeds the noise's variance.

    Args:
        gram: uncentered ``G_x = sum x x^T``, (D, D), in the color space of the training.
        tokens: how many it sums over.

    Raises:
        ValueError: if there are no tokens.
    """
    if tokens < 1:
        raise ValueError("rank: no tokens")
    spectrum = torch.linalg.eigvalsh(gram.double()).flip(0).clamp(min=0.0) / tokens
    return AutoRank(int((spectrum > NOISE).sum()), tuple(spectrum.tolist()))
