"""Aspect buckets: a few sizes of about one area, so that images are cropped little and still share a batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from math import log

from liftkit.data.source import Size
from liftkit.errors import UsageError


def square(resolution: int, multiple: int) -> Size:
    """The one size without buckets: the largest square of whole tokens.

    Raises:
        UsageError: if the resolution is smaller than a token.
    """
    side = resolution // multiple * multiple
    if side == 0:
        raise UsageError(f"resolution {resolution}: smaller than the {multiple} pixels of one token")
    return side, side


def bucket_sizes(resolution: int, multiple: int, max_ratio: float = 2.0) -> list[Size]:
    """Sizes of about ``resolution``^2 pixels.

    Args:
        resolution: side of the square among them, in pixels.
        multiple: all sides are divisible by this.
        max_ratio: of the longer side to the shorter.

    Returns:
        (height, width), the widest first; with each its transpose.

    Raises:
        UsageError: if the resolution is smaller than ``multiple``, or the ratio than 1.
    """
    side, _ = square(resolution, multiple)
    if not max_ratio >= 1.0:
        raise UsageError(f"buckets: a ratio of {max_ratio}; the longer side to the shorter is at least 1")
    sizes = {(side, side)}
    for short in range(multiple, side, multiple):
        long = round(side * side / short / multiple) * multiple
        if long <= max_ratio * short:
            sizes |= {(short, long), (long, short)}
    return sorted(sizes, key=lambda size: size[0] / size[1])


def nearest_bucket(height: int, width: int, buckets: Iterable[Size]) -> Size:
    """The bucket whose shape is nearest to an image's, by the logarithm of the ratio; of equal ones the larger."""
    ratio = log(height / width)
    return min(buckets, key=lambda size: (abs(ratio - log(size[0] / size[1])), -size[0] * size[1]))


def assign_buckets(sizes: list[Size], buckets: list[Size], at_least: int) -> list[Size]:
    """The bucket of each image, such that none that is used holds few images.

    A bucket with fewer than ``at_least`` images would fill batches with repetitions: the emptiest goes, its images move to the
    nearest that is left, until all have enough or one is left.

    Args:
        sizes: (height, width) of the images.
        buckets: sizes to choose from.
        at_least: images a bucket.
    """
    chosen = [nearest_bucket(*size, buckets) for size in sizes]
    counts = Counter(chosen)
    while len(counts) > 1 and min(counts.values()) < at_least:
        emptiest = min(counts, key=lambda bucket: (counts[bucket], bucket))
        left = [bucket for bucket in buckets if bucket in counts and bucket != emptiest]
        chosen = [nearest_bucket(*size, left) if now == emptiest else now for size, now in zip(sizes, chosen)]
        counts = Counter(chosen)
    return chosen
