"""What the fit costs beyond its floor, the VAE encoding the same images: python -m benchmarks fit

Side by side in one run, in turns: every pass, with its moments in K folds, stands between two runs of encoding alone and is
compared with their mean; the overhead is the median of these quotients. A drifting machine disturbs both alike. Once with one
thread, where other programs disturb least, and once with all.

The C library gives memory back to the system and takes it again, page by page, differently in every process: that was a fifth
of the VAE's time, as much as the pass itself takes several times over, and whether a pass or the encoding beside it met with
it was chance. So freed memory is kept here, which makes encoding faster and the overhead, which is compared with it, larger.

Then the moment update alone at a real model's size, and what share of a real VAE's time that is.
"""

from __future__ import annotations

import argparse
import ctypes
import platform
import resource
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version

import torch
from _table import Row, add_option, finish
from diffusers import AutoencoderKLFlux2

from liftkit.color import to_signed
from liftkit.data.images import DemoImages, batches
from liftkit.embedded import TINY_KLEIN
from liftkit.fit.engine import fit_collected, fit_pass
from liftkit.fit.folds import FoldedMoments
from liftkit.fit.pairs import EncodedImages
from liftkit.fit.stream import Pass, collect
from liftkit.models.latents import LatentSpace
from liftkit.options import FitOptions

PASSES = {"one color space": ("oklab",), "--color auto": ("oklab", "srgb")}
RANK, DIM, TOKENS = 128, 768, 4096
GOAL = 1.10
"""Of a pass, encoding alone being 1."""
USUAL = 2048
"""Images of a fit that is not told how many."""


def keep_freed_memory() -> None:
    """Have glibc give back nothing under a gigabyte; other C libraries are left as they are."""
    trim_threshold, mmap_threshold = -1, -3
    if platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        library.mallopt(trim_threshold, 2**30)
        library.mallopt(mmap_threshold, 2**25)


def encode_alone(space: LatentSpace, count: int) -> None:
    """Drawing and encoding, with nothing kept."""
    for _, images in batches(DemoImages(count).images(64, 8), 16):
        space.encode(to_signed(images))


def whole_pass(space: LatentSpace, count: int, colors: tuple[str, ...]) -> None:
    """The pass that every fit and figure rests on, to the last fold's moments."""
    collection = collect(Pass(EncodedImages(space, DemoImages(count), 64, 2), colors, 2))
    assert all(folds.total.images == count for folds in collection.folds.values())


def measured(work: Callable[[], None]) -> tuple[float, int]:
    """What some work takes: seconds, and page faults."""
    faults, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
    work()
    return time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults


def side_by_side(space: LatentSpace, count: int, rounds: int) -> tuple[float, dict[str, float]]:
    """Print rates and overheads of all passes; images per second of encoding alone, and the overheads."""
    floor = lambda: measured(lambda: encode_alone(space, count))
    before = floor()
    floors, rows = [before], {name: [] for name in PASSES}
    for _ in range(rounds):
        for name, colors in PASSES.items():
            taken, after = measured(lambda colors=colors: whole_pass(space, count, colors)), floor()
            rows[name].append((*taken, 2 * taken[0] / (before[0] + after[0]) - 1))
            floors.append(after)
            before = after
    seconds, faults = (statistics.median(values) / count for values in zip(*floors))
    print(
        f"{torch.get_num_threads()} threads: encoding alone {1 / seconds:.1f} images/s, {faults:.0f} page faults each"
    )
    alone = 1 / seconds
    for name, found in rows.items():
        seconds, faults, overhead = (statistics.median(values) for values in zip(*found))
        low, _, high = statistics.quantiles([row[2] for row in found], n=4)
        print(
            f"  the pass, {name:16s} {count / seconds:7.1f} images/s, {faults / count:.0f} page faults each   "
            f"overhead {overhead:6.1%} (quartiles {low:.1%} to {high:.1%})"
        )
    return alone, {name: statistics.median(row[2] for row in found) for name, found in rows.items()}


def what_follows(space: LatentSpace, count: int) -> tuple[float, float]:
    """Seconds that come once, after the pass: the fit with all figures, and the same with pictures, which the VAE paints."""
    source, options = EncodedImages(space, DemoImages(count), 64, 2), FitOptions(images="demo", device="cpu")
    collection = fit_pass(source, options, 2)
    fit_collected(collection, options, 2)
    figures = measured(lambda: fit_collected(collection, options, 2))[0]
    return figures, measured(lambda: fit_collected(collection, options, 2, source))[0]


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256, help="images of each run (%(default)s)")
    parser.add_argument("--rounds", type=int, default=8, help="paired runs of each pass (%(default)s)")
    parser.add_argument("--give-memory-back", action="store_true", help="leave the C library's memory as it is")
    add_option(parser)
    options = parser.parse_args()
    if not options.give_memory_back:
        keep_freed_memory()
    torch.set_grad_enabled(False)
    space = LatentSpace(AutoencoderKLFlux2.from_pretrained(TINY_KLEIN, subfolder="vae").eval().requires_grad_(False))
    print(f"torch {version('torch')}, {platform.machine()}")
    encode_alone(space, options.images)
    every = torch.get_num_threads()
    for threads in sorted({1, every}):
        torch.set_num_threads(threads)
        rate, overheads = side_by_side(space, options.images, options.rounds)
        figures, pictures = what_follows(space, options.images)
        print(
            f"  then, once: fit and figures {figures:.2f} s, {figures * rate / USUAL:.1%} of encoding the usual {USUAL} images; "
            f"with pictures, which the VAE paints, {pictures:.2f} s"
        )
    # Of the last pass: with as many threads as there are processors.
    found = [
        Row(f"fit: a pass, {name} / encoding alone", 1 / rate, (1 + overhead) / rate, "s/image", 1 + overhead, GOAL)
        for name, overhead in overheads.items()
    ]
    finish(found, options.rows)
    if options.rows is not None:
        return
    moments, encoder = moments_alone(), real_encoder()
    print(f"moment update, r {RANK}, D {DIM}: {moments:.0f} tokens/s; FLUX.2-sized encoder: {encoder:.0f} tokens/s")
    print(f"so the moments take {encoder / moments:.2%} of a real encoder's time")


if __name__ == "__main__":
    main()
