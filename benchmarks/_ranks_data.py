"""What the runs of ranks.py share: their plan, the data, and the data's principal directions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

PATCH, FULL, DIM, CLASSES = 8, 64, 192, 10


@dataclass(frozen=True)
class Plan:
    """What all runs have in common."""

    data: str
    device: str
    steps: int
    batch: int
    rate: float
    depth: int
    width: int
    samples: int
    sampler_steps: int
    threads: int
    guidance: tuple[float, ...]
    held_out: int
    graphs: bool
    side: int
    noise_mean: float
    noise_std: float
    embeddings: float


def draw_data(path: Path, count: int, held_out: int) -> None:
    """Draw the demonstration data, and keep them."""
    from liftkit.data import demo

    parts: dict[str, Any] = {}
    for name, many, split in (("train", count, "train"), ("test", held_out, "heldout")):
        images, scenes = demo.images(many, split=split)  # type: ignore[arg-type]
        parts[name] = images.transpose(0, 3, 1, 2)
        parts[f"{name}_labels"] = np.asarray([(s.digit, s.color, s.background) for s in scenes], dtype=np.int64)
    np.savez_compressed(path, **parts)


def signed(images: np.ndarray, device: str) -> Tensor:
    """uint8 images to [-1, 1]."""
    return torch.from_numpy(images).to(device).float() / 127.5 - 1.0


def principal(images: np.ndarray) -> Tensor:
    """All eigenvectors of the patches' second moments, largest first, (D, D) float64."""
    from liftkit.tokens import patchify

    gram = torch.zeros(DIM, DIM, dtype=torch.float64)
    for part in np.array_split(images, max(1, len(images) // 256)):
        tokens = patchify(signed(part, "cpu").double(), PATCH).reshape(-1, DIM)
        gram += tokens.T @ tokens
    return torch.linalg.eigh(gram)[1].flip(1)


def load(plan: Plan) -> tuple[dict[str, np.ndarray], Tensor]:
    """The data, and the principal directions of the training part."""
    found = dict(np.load(plan.data))
    if plan.side < FULL:
        by = FULL // plan.side
        for name in ("train", "test"):
            cells = found[name].reshape(-1, 3, plan.side, by, plan.side, by).astype(np.float32)
            found[name] = np.rint(cells.mean((3, 5))).astype(np.uint8)
    found |= {name: found[name][: plan.held_out] for name in ("test", "test_labels")}
    return found, principal(found["train"])


def spectrum(images: np.ndarray, basis: Tensor) -> list[float]:
    """Second moments of the patches along their principal directions, largest first."""
    from liftkit.tokens import patchify

    tokens = patchify(signed(images[:2048], "cpu").double(), PATCH).reshape(-1, DIM)
    return (tokens @ basis).square().mean(0).tolist()
