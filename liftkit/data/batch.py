"""What one step trains on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor


class Row(NamedTuple):
    """One image of a batch."""

    image: Tensor
    latents: Tensor | None
    prompts: dict[str, Tensor]
    caption: str
    place: tuple[int, int]


@dataclass(frozen=True)
class Batch:
    """What one step trains on.

    Args:
        images: (B, 3, H, W), uint8: a quarter of the way to the device, and a table lookup away from linear RGB.
        latents: (B, C, h, w) normalized, float32; None where no image encoder was given.
        prompts: arguments of the transformer, (B, ...) each, in the dtype they were encoded in.
        captions: the prompts in words, empty where dropped.
        indices: source number and index of each image.
    """

    images: Tensor
    latents: Tensor | None
    prompts: dict[str, Tensor]
    captions: list[str]
    indices: list[tuple[int, int]]

    def to(self, device: torch.device) -> Batch:
        """The same on a device; copies from pinned memory may still be on their way."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=tensor.is_pinned()))

    def pinned(self) -> Batch:
        """The same in memory that a GPU copies from by itself."""
        return self._each(torch.Tensor.pin_memory)

    def tensors(self) -> list[Tensor]:
        """Images, latents and prompts."""
        return [self.images, *([self.latents] if self.latents is not None else []), *self.prompts.values()]

    def _each(self, work: Callable[[Tensor], Tensor]) -> Batch:
        latents = work(self.latents) if self.latents is not None else None
        prompts = {name: work(value) for name, value in self.prompts.items()}
        return replace(self, images=work(self.images), latents=latents, prompts=prompts)

    def rows(self, part: slice) -> Batch:
        """Some of its rows."""
        return replace(
            self._each(lambda tensor: tensor[part]), captions=self.captions[part], indices=self.indices[part]
        )

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Batch:
        """The batch of some rows."""
        latents = [row.latents for row in rows if row.latents is not None]
        return cls(
            torch.stack([row.image for row in rows]),
            torch.stack(latents) if latents else None,
            {name: torch.stack([row.prompts[name] for row in rows]) for name in rows[0].prompts},
            [row.caption for row in rows],
            [row.place for row in rows],
        )
