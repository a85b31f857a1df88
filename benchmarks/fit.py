"""What the fit costs beyond its floor, the VAE encoding the same images: python benchmarks/fit.py

Side by side in one run, in turns: every pass, with its moments in K folds, stands between two runs of encoding alone and is
compared with their mean; the overhead is the median of these quotients. A drifting machine disturbs both alike. Once with one
thread, where other programs disturb least, and once with all. Processor time is that of all threads together; threads that
wait sleep, so that it counts work alone.

Then the moment update alone at a real model's size, and what share of a real VAE's time that is.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version

import torch
from diffusers import AutoencoderKLFlux2

from liftkit.data.images import DemoImages, batches, to_signed
from liftkit.embedded import TINY_KLEIN
from liftkit.fit.folds import FoldedMoments
from liftkit.fit.pairs import EncodedImages
from liftkit.fit.stream import Pass, collect
from liftkit.models.latents import LatentSpace

IMAGES, ROUNDS = 64, 25
PASSES = {"one colour space": ("oklab",), "--color auto": ("oklab", "srgb")}
RANK, DIM, TOKENS = 128, 768, 4096


def encode_alone(space: LatentSpace) -> None:
    """Drawing and encoding, with nothing kept."""
    for _, images in batches(DemoImages(IMAGES).images(64, 8), 16):
        space.encode(to_signed(images))


def whole_pass(space: LatentSpace, colors: tuple[str, ...]) -> None:
    """The pass that every fit and figure rests on, to the last fold's moments."""
    collection = collect(Pass(EncodedImages(space, DemoImages(IMAGES), 64, 2), colors, 2))
    for folds in collection.folds.values():
        assert sum(fold.images for fold in folds.folds) == IMAGES


def seconds(work: Callable[[], None]) -> tuple[float, float]:
    """What some work takes: on the clock, and of the processor."""
    clock, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - clock, time.process_time() - processor


def side_by_side(space: LatentSpace) -> None:
    """Print rates and overheads of all passes."""
    floor = lambda: seconds(lambda: encode_alone(space))
    before, floors = floor(), []
    rows: dict[str, list[tuple[float, float, float]]] = {name: [] for name in PASSES}
    for _ in range(ROUNDS):
        for name, colors in PASSES.items():
            taken, after = seconds(lambda colors=colors: whole_pass(space, colors)), floor()
            clock, processor = (2 * taken[i] / (before[i] + after[i]) - 1 for i in range(2))
            rows[name].append((IMAGES / taken[0], clock, processor))
            floors.append(IMAGES / after[0])
            before = after
    print(f"{torch.get_num_threads()} threads: encoding alone {statistics.median(floors):.1f} images/s")
    for name, found in rows.items():
        rate, clock, processor = (statistics.median(values) for values in zip(*found))
        low, _, high = statistics.quantiles([row[1] for row in found], n=4)
        print(
            f"  the pass, {name:16s} {rate:7.1f} images/s   overhead {clock:6.1%} (quartiles {low:.1%} to {high:.1%}), "
            f"of processor time {processor:6.1%}"
        )


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
    print(f"torch {version('torch')}, {platform.machine()}")
    encode_alone(space)
    every = torch.get_num_threads()
    for threads in sorted({1, every}):
        torch.set_num_threads(threads)
        side_by_side(space)
    moments, encoder = moments_alone(), real_encoder()
    print(f"moment update, r {RANK}, D {DIM}: {moments:.0f} tokens/s; FLUX.2-sized encoder: {encoder:.0f} tokens/s")
    print(f"so the moments take {encoder / moments:.2%} of a real encoder's time")


if __name__ == "__main__":
    main()
