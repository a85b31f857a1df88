"""What the fit costs beyond its floor, the VAE encoding the same images: python benchmarks/fit.py

Side by side in one run, in turns, so that a drifting machine disturbs both alike: encoding alone, and the whole pass with
moments in K folds. Then the moment update alone at a real model's size, and what share of a real VAE's time that is.
"""

from __future__ import annotations

import platform
import statistics
import time
from importlib.metadata import version

import torch
from diffusers import AutoencoderKLFlux2

from liftkit.data.images import DemoImages, batches
from liftkit.demo import TINY_KLEIN
from liftkit.fit.folds import FoldedMoments
from liftkit.fit.pairs import EncodedImages
from liftkit.fit.stream import Pass, collect
from liftkit.models.latents import LatentSpace

IMAGES, ROUNDS = 512, 5
RANK, DIM, TOKENS = 128, 768, 4096


def encode_alone(space: LatentSpace) -> float:
    """Images per second of drawing and encoding, with nothing kept."""
    start = time.perf_counter()
    for _, images in batches(DemoImages(IMAGES).images(64, 8), 16):
        space.encode(images)
    return IMAGES / (time.perf_counter() - start)


def whole_pass(space: LatentSpace, colors: tuple[str, ...]) -> float:
    """Images per second of the pass that every fit and figure rests on."""
    source = EncodedImages(space, DemoImages(IMAGES), 64, 2)
    start = time.perf_counter()
    collect(Pass(source, colors, 2))
    return IMAGES / (time.perf_counter() - start)


def moments_alone(rounds: int = 4) -> float:
    """Tokens per second of the moment update at FLUX.2's size."""
    folds = FoldedMoments(RANK, DIM)
    z, x = torch.randn(1, TOKENS, RANK), torch.randn(1, TOKENS, DIM)
    folds.update(z, x, torch.tensor([0]))
    start = time.perf_counter()
    for index in range(rounds):
        folds.update(z, x, torch.tensor([index]))
    return rounds * TOKENS / (time.perf_counter() - start)


def real_encoder(side: int = 512) -> float:
    """Tokens per second of a FLUX.2-sized VAE encoder with random weights, at a quarter of a megapixel."""
    vae = AutoencoderKLFlux2(block_out_channels=(128, 256, 512, 512)).eval()
    space = LatentSpace(vae)
    start = time.perf_counter()
    space.encode(torch.zeros(1, 3, side, side))
    return (side // 16) ** 2 / (time.perf_counter() - start)


def main() -> None:
    space = LatentSpace(AutoencoderKLFlux2.from_pretrained(TINY_KLEIN, subfolder="vae").eval().requires_grad_(False))
    torch.set_grad_enabled(False)
    encode_alone(space)
    rows: dict[str, list[float]] = {
        "encoding alone": [],
        "the pass, one colour space": [],
        "the pass, --color auto": [],
    }
    for _ in range(ROUNDS):
        rows["encoding alone"].append(encode_alone(space))
        rows["the pass, one colour space"].append(whole_pass(space, ("oklab",)))
        rows["the pass, --color auto"].append(whole_pass(space, ("oklab", "srgb")))
    print(f"torch {version('torch')}, {torch.get_num_threads()} threads, {platform.machine()}")
    for name, rates in rows.items():
        overheads = [floor / rate - 1 for floor, rate in zip(rows["encoding alone"], rates)]
        print(f"{name:28s} {statistics.median(rates):7.1f} images/s   overhead {statistics.median(overheads):6.1%}")
    moments, encoder = moments_alone(), real_encoder()
    print(f"moment update, r {RANK}, D {DIM}: {moments:.0f} tokens/s; FLUX.2-sized encoder: {encoder:.0f} tokens/s")
    print(f"so the moments take {encoder / moments:.2%} of a real encoder's time")


if __name__ == "__main__":
    main()
