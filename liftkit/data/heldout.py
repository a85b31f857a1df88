"""Images set apart for validation: never trained on, whatever the order."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy as np
from torch import Tensor

from liftkit.data.captioned import DemoCaptioned
from liftkit.data.picture_errors import PictureError
from liftkit.data.source import CaptionedSource, Size
from liftkit.errors import UsageError

Weighted = list[tuple[CaptionedSource, float]]
MOST = 256
"""Images that are held out at most, unless a recipe says otherwise."""
FEW = 8
"""Held-out images up to which each has to be a good one."""


class Part(CaptionedSource):
    """Some images of a source.

    Args:
        source: whole.
        indices: of the images that belong to the part.
    """

    def __init__(self, source: CaptionedSource, indices: Sequence[int]) -> None:
        self.source, self.indices = source, list(indices)
        self.name, self.tally, self.texts = source.name, source.tally, source.texts
        self.references = source.references

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

    def made_from(self, index: int) -> tuple[int, ...]:
        """See :class:`CaptionedSource`."""
        return self.source.made_from(self.indices[index])

    def has_captions(self) -> bool:
        """See :class:`CaptionedSource`: of the whole source."""
        return self.source.has_captions()

    def describe(self) -> dict[str, Any]:
        """See :class:`CaptionedSource`."""
        return {**self.source.describe(), "name": self.name, "part": len(self.indices)}


def split(sources: Weighted, count: int | None, seed: int) -> tuple[Weighted, Weighted, list[str]]:
    """Set about ``count`` images apart, of each source by its weight; the demo data have a held-out split of their own.

    Images whose files cannot be opened are neither set apart nor counted.

    Args:
        sources: with their weights.
        count: images in all; None for :data:`MOST`, but of no source more than a tenth.
        seed: of the choice.

    Returns:
        The sources to train on, those set apart (none where all are too small), and what a user has to know.

    Raises:
        UsageError: if a source would lose more than half of its images.
    """
    total = sum(weight for _, weight in sources)
    train: Weighted = []
    apart: Weighted = []
    notes = []
    for number, (source, weight) in enumerate(sources):
        share = max(1, round((count or MOST) * weight / total))
        if isinstance(source, DemoCaptioned):
            train.append((source, weight))
            apart.append((DemoCaptioned(share, split="heldout"), weight))
            continue
        order = np.random.Generator(np.random.PCG64([seed, number])).permutation(len(source)).tolist()
        readable = len(source)
        # Of a large source a few broken files make no difference.
        if 10 * share > readable:
            order = [index for index in order if _is_sound(source, index)]
            readable = len(order)
        if count is None:
            share = min(share, readable // 10)
            if not share:
                notes.append(
                    f"{source.name}: {readable} images are too few to hold a tenth out, and all are trained on"
                )
        elif 2 * share > readable:
            raise UsageError(
                f"validation.images: {share} of the {readable} images of {source.name} would be held out, half at most; "
                "leave it out to hold out a tenth, take fewer, or set validation.every: 0"
            )
        # Of a handful each has to be a good one.
        sound = (index for index in order if _is_sound(source, index, decode=share <= FEW))
        chosen = set(islice(sound, share))
        train.append((Part(source, [index for index in range(len(source)) if index not in chosen]), weight))
        if chosen:
            apart.append((Part(source, sorted(chosen)), weight))
    if not apart:
        notes.append("no validation: no image is held out")
    return train, apart, notes


def _is_sound(source: CaptionedSource, index: int, *, decode: bool = False) -> bool:
    """Whether an image can be opened, or decoded."""
    try:
        source.image(index, (16, 16)) if decode else source.size(index)
    except PictureError:
        return False
    return True
