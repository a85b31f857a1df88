"""Images set apart for validation: never trained on, whatever the order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from liftkit.data.captioned import DemoCaptioned
from liftkit.data.source import CaptionedSource, Size
from liftkit.errors import UsageError

Weighted = list[tuple[CaptionedSource, float]]


class Part:
    """Some images of a source.

    Args:
        source: whole.
        indices: of the images that belong to the part.
    """

    def __init__(self, source: CaptionedSource, indices: Sequence[int]) -> None:
        self.source, self.indices = source, list(indices)
        self.name, self.tally, self.texts = source.name, source.tally, source.texts

    def __len__(self) -> int:
        return len(self.indices)

    def label(self, index: int) -> str:
        """See :class:`CaptionedSource`."""
        return self.source.label(self.indices[index])

    def stamp(self, index: int) -> str | None:
        """See :class:`CaptionedSource`."""
        return self.source.stamp(self.indices[index])

    def key(self, index: int) -> str:
        """See :class:`CaptionedSource`."""
        return self.source.key(self.indices[index])

    def size(self, index: int) -> Size:
        """See :class:`CaptionedSource`."""
        return self.source.size(self.indices[index])

    def remark(self, index: int) -> str:
        """See :class:`CaptionedSource`."""
        return self.source.remark(self.indices[index])

    def image(self, index: int, size: Size) -> Tensor:
        """See :class:`CaptionedSource`."""
        return self.source.image(self.indices[index], size)

    def caption(self, index: int) -> str:
        """See :class:`CaptionedSource`."""
        return self.source.caption(self.indices[index])

    def has_captions(self) -> bool:
        """See :class:`CaptionedSource`: of the whole source."""
        return self.source.has_captions()

    def describe(self) -> dict[str, Any]:
        """See :class:`CaptionedSource`."""
        return {**self.source.describe(), "part": len(self.indices)}


def split(sources: Weighted, count: int, seed: int) -> tuple[Weighted, Weighted]:
    """Set about ``count`` images apart, of each source by its weight; the demo data have a held-out split of their own.

    Returns:
        The sources to train on, and those set apart.

    Raises:
        UsageError: if a source would lose more than half of its images.
    """
    total = sum(weight for _, weight in sources)
    train: Weighted = []
    apart: Weighted = []
    for number, (source, weight) in enumerate(sources):
        share = max(1, round(count * weight / total))
        if isinstance(source, DemoCaptioned):
            train.append((source, weight))
            apart.append((DemoCaptioned(share, split="heldout"), weight))
            continue
        if 2 * share > len(source):
            raise UsageError(
                f"validation.images: {share} of the {len(source)} images of {source.name} would be held out; "
                "take fewer, or validation.every: 0"
            )
        order = np.random.Generator(np.random.PCG64([seed, number])).permutation(len(source)).tolist()
        train.append((Part(source, sorted(order[share:])), weight))
        apart.append((Part(source, sorted(order[:share])), weight))
    return train, apart
