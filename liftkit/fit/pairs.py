"""Where pairs of latents and images come from: images that are encoded, or latents that are decoded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from liftkit.color import to_signed
from liftkit.data.images import ImageSource, batches
from liftkit.models.latents import LatentSpace
from liftkit.tally import Tally

PIXELS_AT_ONCE = 1024 * 1024
Pair = tuple[Tensor, Tensor, Tensor]


class PairSource(Protocol):
    """Pairs in a fixed order; place i of it always holds the same pair."""

    space: LatentSpace

    @property
    def tally(self) -> Tally:
        """The account of images."""

    def __len__(self) -> int: ...

    def pairs(self, which: range) -> Iterator[Pair]:
        """Batches of places (B,), normalized latents (B, C, h, w) and images (B, 3, H, W), uint8 or in [-1, 1]."""

    def describe(self) -> dict[str, Any]:
        """Plain data for reports."""


class EncodedImages:
    """Images and their latents, by the VAE's encoder.

    Args:
        space: the latent space; its VAE's device does the work.
        source: of images.
        resolution: side of the images at most, in pixels.
        latent_patch: side of the latent patch of one token; images are cropped to whole tokens.
    """

    def __init__(self, space: LatentSpace, source: ImageSource, resolution: int, latent_patch: int) -> None:
        self.space, self.source, self.resolution = space, source, resolution
        self.side = space.factor * latent_patch

    @property
    def tally(self) -> Tally:
        """The account of images."""
        return self.source.tally

    def __len__(self) -> int:
        return len(self.source)

    def pairs(self, which: range) -> Iterator[Pair]:
        """See :class:`PairSource`."""
        size = max(1, min(16, PIXELS_AT_ONCE // self.resolution**2))
        full, device = self.resolution - self.resolution % self.side, self.space.vae.device
        for places, images in batches(self.source.images(self.resolution, self.side, which), size):
            images = images.to(device)
            yield places, self._encode(to_signed(images), size if images.shape[-1] == full else 1), images

    def _encode(self, images: Tensor, size: int) -> Tensor:
        """Latents of images in batches of ``size`` exactly, the last one filled up.

        In float32 a VAE's result depends on the batch's shape. With one shape for all images, and one image at a time for
        odd sizes, an image has the same latents whatever part or resumed run it falls into.
        """
        parts = []
        for part in images.split(size):
            short = size - len(part)
            filled = torch.cat([part, part[-1:].expand(short, -1, -1, -1)]) if short else part
            parts.append(self.space.encode(filled)[: len(part)])
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def describe(self) -> dict[str, Any]:
        """See :class:`PairSource`."""
        return {**self.source.describe(), "resolution": self.resolution}


class DecodedLatents:
    """Latents and what the VAE's decoder makes of them: no image is needed.

    Args:
        space: the latent space.
        draw: latents (1, C, h, w) of a place.
        count: how many.
        description: plain data for reports.
    """

    def __init__(
        self, space: LatentSpace, draw: Callable[[int], Tensor], count: int, description: dict[str, Any]
    ) -> None:
        self.space, self.draw, self.count, self.description = space, draw, count, description

    @property
    def tally(self) -> Tally:
        """Of nothing: every place has its latents."""
        return Tally("images")

    def __len__(self) -> int:
        return self.count

    def pairs(self, which: range) -> Iterator[Pair]:
        """See :class:`PairSource`."""
        first = self.draw(0)
        pixels = first.shape[-2] * first.shape[-1] * self.space.factor**2
        size = max(1, min(16, PIXELS_AT_ONCE // pixels))
        for start in range(0, len(which), size):
            places = list(which[start : start + size])
            latents = torch.cat([self.draw(place) for place in places]).to(self.space.vae.device)
            yield torch.tensor(places), latents, self.space.decode(latents)

    def describe(self) -> dict[str, Any]:
        """See :class:`PairSource`."""
        return {**self.description, "used": self.count}


def normal_latents(space: LatentSpace, resolution: int, count: int, seed: int) -> DecodedLatents:
    """Standard normal latents: what the normalization makes of them on average, without any structure."""
    side = resolution // space.factor

    def draw(place: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + place)
        return torch.randn(1, space.channels, side, side, generator=generator)

    return DecodedLatents(space, draw, count, {"source": "normal latents", "seed": seed, "resolution": resolution})


def given_latents(space: LatentSpace, latents: Tensor, description: dict[str, Any]) -> DecodedLatents:
    """Latents (n, C, h, w) at hand, such as a latent model's own samples."""
    return DecodedLatents(space, lambda place: latents[place : place + 1], len(latents), description)
