"""The latent space of tiny-klein, and fits of demo images in it."""

from __future__ import annotations

from functools import cache
from typing import Any

from diffusers import AutoencoderKLFlux2

from liftkit.data.images import DemoImages
from liftkit.embedded import TINY_KLEIN
from liftkit.fit.engine import fit_collected, fit_pass
from liftkit.fit.pairs import EncodedImages
from liftkit.lift import Lift
from liftkit.models.latents import LatentSpace
from liftkit.options import FitOptions


@cache
def latent_space() -> LatentSpace:
    """Not to be changed."""
    return LatentSpace(AutoencoderKLFlux2.from_pretrained(TINY_KLEIN, subfolder="vae").eval().requires_grad_(False))


def demo_source(count: int, space: LatentSpace | None = None) -> EncodedImages:
    """Demo images with their latents."""
    return EncodedImages(space or latent_space(), DemoImages(count), 64, 2)


def fitted(source: Any, **options: Any) -> Lift:
    """A lift with its figures, by options of :class:`FitOptions`."""
    chosen = FitOptions(**options)
    return fit_collected(fit_pass(source, chosen, 2), chosen, 2, source)
