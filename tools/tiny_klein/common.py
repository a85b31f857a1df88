"""What the stages share: where their results lie, the data as tensors, atomic safetensors files, a log line."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from liftkit.data import demo

SEED = 0
WORK = Path("build/tiny-klein")


def work_file(name: str) -> Path:
    """A stage's result in the (git-ignored) build folder."""
    WORK.mkdir(parents=True, exist_ok=True)
    return WORK / name


def save(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file whole or not at all."""
    temporary = path.with_suffix(".part")
    save_file({key: value.contiguous() for key, value in tensors.items()}, temporary)
    os.replace(temporary, path)


def load(name: str) -> dict[str, Tensor]:
    """Read a stage's result.

    Raises:
        SystemExit: when the stage that makes it has not run.
    """
    path = WORK / name
    if not path.exists():
        raise SystemExit(f"{path} is missing: run the stage that makes it first (python -m tools.tiny_klein --help)")
    return load_file(path)


def demo_images(count: int, *, split: demo.Split = "train", start: int = 0) -> tuple[Tensor, list[demo.Scene]]:
    """Demo images as uint8 (count, 3, 64, 64), and their scenes."""
    images, scenes = demo.images(count, split=split, seed=SEED, start=start)
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))), scenes


def batches(count: int, batch_size: int, steps: int, seed: int = SEED) -> Iterator[tuple[int, Tensor]]:
    """``steps`` batches of indices below ``count``, reshuffled at every pass."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    for step in range(steps):
        if len(order) < batch_size:
            order = torch.cat([order, torch.randperm(count, generator=generator)])
        yield step, order[:batch_size]
        order = order[batch_size:]


def cosine(step: int, steps: int, warmup: int = 50) -> float:
    """Learning rate factor: linear warm-up, then a half cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


class Log:
    """One line now and then: step, images per second, figures."""

    def __init__(self, name: str, steps: int, batch_size: int, every: int = 100) -> None:
        self.name, self.steps, self.batch_size, self.every = name, steps, batch_size, every
        self.start = time.monotonic()

    def __call__(self, step: int, **figures: float) -> None:
        if (step + 1) % self.every and step + 1 != self.steps:
            return
        rate = (step + 1) * self.batch_size / (time.monotonic() - self.start)
        left = (self.steps - step - 1) * self.batch_size / rate
        text = "  ".join(f"{key} {value:.4g}" for key, value in figures.items())
        print(f"{self.name} {step + 1}/{self.steps}  {rate:.0f} images/s  {left:.0f} s left  {text}", flush=True)
