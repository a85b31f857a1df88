"""What one step trains on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Row(NamedTuple):
    """One image of a batch."""

    image: Tensor
    latents: Tensor | None
    prompts: dict[str, Tensor]
    caption: str
    place: tuple[int, int]
    references: list[Tensor]
    reference_latents: list[Tensor]


@dataclass(frozen=True)
class Batch:
    """What one step trains on.

    Args:
        images: (B, 3, H, W), uint8: a quarter of the way to the device, and a table lookup away from linear RGB.
        latents: (B, C, h, w) normalized, float32; None where no image encoder was given.
        prompts: arguments of the transformer, (B, ...) each, in the dtype they were encoded in.
        captions: the prompts in words, empty where dropped.
        indices: source number and index of each image.
        references: (B, R, 3, H, W), uint8: what each image was made from; None where nothing.
        reference_latents: (B, R, C, h, w) of these, as ``latents``.
    """

    images: Tensor
    latents: Tensor | None
    prompts: dict[str, Tensor]
    captions: list[str]
    indices: list[tuple[int, int]]
    references: Tensor | None = None
    reference_latents: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """The same on a device; copies from pinned memory may still be on their way."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=tensor.is_pinned()))

    def pinned(self) -> Batch:
        """The same in memory that a GPU copies from by itself."""
        return self._each(torch.Tensor.pin_memory)

    def tensors(self) -> list[Tensor]:
        """Images, latents, prompts and references."""
        optional = (self.latents, self.references, self.reference_latents)
        return [self.images, *(each for each in optional if each is not None), *self.prompts.values()]

    def _each(self, work: Callable[[Tensor], Tensor]) -> Batch:
        tensors = {name: getattr(self, name) for name in ("images", "latents", "references", "reference_latents")}
        changed: dict[str, Any] = {name: work(tensor) for name, tensor in tensors.items() if tensor is not None}
        return replace(self, prompts={name: work(value) for name, value in self.prompts.items()}, **changed)

    def rows(self, part: slice) -> Batch:
        """Some of its rows."""
        return replace(
            self._each(lambda tensor: tensor[part]), captions=self.captions[part], indices=self.indices[part]
        )

    def pick(self, rows: Sequence[int]) -> Batch:
        """Some of its rows, by their numbers; see :func:`pick`."""
        return replace(
            self._each(lambda tensor: pick(tensor, rows)),
            captions=[self.captions[row] for row in rows],
            indices=[self.indices[row] for row in rows],
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
            torch.stack([torch.stack(row.references) for row in rows]) if rows[0].references else None,
            torch.stack([torch.stack(row.reference_latents) for row in rows]) if rows[0].reference_latents else None,
        )


def pick(tensor: Tensor, rows: Sequence[int]) -> Tensor:
    """Rows of a tensor by numbers that the host knows: a list as an index would make the host wait for a GPU."""
    return torch.stack([tensor[row] for row in rows])
