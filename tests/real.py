"""Real latent spaces, where they lie beside the checkout: moments of photographs, and two tiny encoders.

They are looked for in ``shared/data`` beside this folder and above it, and where LIFTKIT_TEST_DATA says.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from liftkit.fit.moments import TokenMoments


def real_data() -> Path:
    """The folder; a test that asks for it is skipped where there is none."""
    places = [Path(os.environ["LIFTKIT_TEST_DATA"])] if "LIFTKIT_TEST_DATA" in os.environ else []
    places += [folder / "shared" / "data" for folder in Path(__file__).resolve().parents]
    for place in places:
        if (place / "flux2-moments").is_dir():
            return place
    pytest.skip("no real latents beside the checkout")


def flux2_moments(name: str) -> TokenMoments:
    """Moments of photographs and their FLUX.2 latents (by TAEF2): r = 128, D = 768, Oklab.

    Args:
        name: ``imagenet_a``, ``imagenet_b`` or ``bsds``.
    """
    sums = load_file(real_data() / "flux2-moments" / f"taef2_{name}.safetensors")
    count, double = int(sums["count"]), {key: value.double() for key, value in sums.items()}
    moments = TokenMoments(128, 768)
    moments.count, moments.images = count, int(sums["images"])
    upper = torch.zeros(768, 768, dtype=torch.float64)
    rows, columns = torch.triu_indices(768, 768)
    upper[rows, columns] = double["pixel_gram_triu"]
    moments.pixel_gram = count * (upper + upper.triu(1).T)
    moments.latent_gram, moments.cross = count * double["latent_gram"], count * double["cross"]
    moments.latent_sum, moments.pixel_sum = count * double["latent_mean"], count * double["pixel_mean"]
    return moments


class TinyEncoder:
    """A latent space without a decoder: one of the two tiny encoders, built from its keys."""

    def __init__(self, file: str, strided: tuple[int, ...], channels: int) -> None:
        self.tensors = {key: value.float() for key, value in load_file(real_data() / file).items()}
        self.strided, self.channels, self.factor = strided, channels, 2 ** len(strided)
        self.vae = SimpleNamespace(device=torch.device("cpu"))
        self.file = file

    def fingerprint(self) -> str:
        """As :class:`liftkit.models.latents.LatentSpace`."""
        return self.file

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """sRGB (B, 3, H, W) in [-1, 1] to latents (B, C, H / f, W / f)."""
        x, tensors = (images + 1) / 2, self.tensors
        layers = {int(key.split(".")[0]) for key in tensors}
        for layer in range(max(layers) + 1):
            if f"{layer}.conv.0.weight" in tensors:
                x = self.block(x, layer)
            elif layer in layers:
                stride = 2 if layer in self.strided else 1
                x = functional.conv2d(
                    x, tensors[f"{layer}.weight"], tensors.get(f"{layer}.bias"), stride=stride, padding=1
                )
            else:
                x = x.relu()
        return x

    def block(self, x: Tensor, layer: int) -> Tensor:
        """Three convolutions around a shortcut; before them, in some, two that see a normalized image."""
        own = {
            key.removeprefix(f"{layer}."): value for key, value in self.tensors.items() if key.startswith(f"{layer}.")
        }
        if "pool.0.weight" in own:
            pooled = functional.conv2d(x, own["pool.0.weight"])
            pooled = functional.group_norm(pooled, 4, own["pool.1.weight"], own["pool.1.bias"]).relu()
            x = x + functional.conv2d(pooled, own["pool.3.weight"])
        inner = x
        for place in (0, 2, 4):
            inner = functional.conv2d(inner, own[f"conv.{place}.weight"], own[f"conv.{place}.bias"], padding=1)
            inner = inner.relu() if place < 4 else inner
        return (inner + x).relu()


def flux2_encoder() -> TinyEncoder:
    """FLUX.2's latents, by TAEF2: f = 8, patch 2."""
    return TinyEncoder("taef2/taef2_encoder.safetensors", (2, 6, 10), 32)


def sana_encoder() -> TinyEncoder:
    """Sana's latents (DC-AE), by TAESANA: f = 32, patch 1."""
    return TinyEncoder("taesana_encoder.safetensors", (0, 2, 5, 9, 13), 32)
