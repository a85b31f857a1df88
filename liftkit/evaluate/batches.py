"""Large sets of images, a batch at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from liftkit.color import to_signed


def batches(images: Tensor, numbers: int = 2**24) -> Iterator[Tensor]:
    """Batches of about so many numbers, float32 in [-1, 1].

    Args:
        images: (n, 3, H, W) in [-1, 1], or uint8, which keeps a large set small in memory.
        numbers: in one batch, at least one image.
    """
    for part in images.split(max(1, numbers // images[0].numel())):
        yield to_signed(part) if part.dtype == torch.uint8 else part
