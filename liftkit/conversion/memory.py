"""Whether memory allows the proof on the assembled model: what that needs, what there is, and the choice."""

from __future__ import annotations

import re
from math import prod
from pathlib import Path
from typing import Literal

import torch

from liftkit.checkpoint.model import Weights
from liftkit.checkpoint.rewrite import FLOATS

ProofKind = Literal["auto", "model", "projections"]
# Beside the weights in float32: what loading holds for a moment, activations, and the libraries.
ROOM_FACTOR, ROOM_BYTES = 1.25, 1_000_000_000


def choose_proof(wanted: ProofKind, weights: Weights, device: str) -> tuple[ProofKind, str]:
    """How a conversion is proved, ``model`` or ``projections``, and why."""
    if wanted != "auto":
        return wanted, "as asked"
    needed, there = model_memory(weights), available_memory(device)
    kind: ProofKind = "model" if needed <= there else "projections"
    return kind, f"running the model takes {needed / 1e9:.1f} GB with its libraries, {there / 1e9:.1f} GB are free"


def model_memory(weights: Weights) -> int:
    """Bytes that the proof on the model takes: one transformer in float32 at a time."""
    entries = [entry for header in weights.headers.values() for entry in header.tensors.values()]
    numbers = sum(prod(entry.shape) for entry in entries if entry.dtype in FLOATS)
    return round(4 * numbers * ROOM_FACTOR) + ROOM_BYTES


def available_memory(device: str) -> int:
    """Bytes that can be had on a device without pushing others out; on the CPU, within the container's limit."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return min(psutil.virtual_memory().available, _container_limit())


def _container_limit() -> int:
    """What the control group leaves to this process (Linux), its files' cache counted as free; a huge number where it
    sets no limit."""
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        cache = re.search(r"^inactive_file (\d+)$", (group / "memory.stat").read_text(), re.MULTILINE)
    except (OSError, ValueError):
        return 2**62
    return max(limit - used, 0) + (int(cache[1]) if cache else 0)
