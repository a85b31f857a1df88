"""How much memory a run takes: what was measured, and what can be known beforehand."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from torch import nn

from liftkit.finetune.quantize import stored_bytes


def peak_memory(device: Any) -> int:
    """The most bytes in use so far: on the GPU, or of the process where there is none."""
    import torch

    if getattr(device, "type", str(device)) == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_memory() -> int:
    """Bytes of memory that this process holds now; its peak where the system does not say."""
    fields = Path("/proc/self/statm")
    return int(fields.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if fields.exists() else peak_memory("cpu")


def estimate(model: nn.Module, learns: int, average: bool, optimizer: str) -> dict[str, int]:
    """Bytes that training keeps whatever the batch: weights, gradients, optimizer state, running mean.

    Args:
        model: with its frozen and trainable weights in their dtypes.
        learns: numbers that learn.
        average: whether a running mean is kept.
        optimizer: name; Muon keeps one number per weight, AdamW two, its 8-bit kind two of a byte.
    """
    weights = sum(map(stored_bytes, [*model.parameters(), *model.buffers()]))
    per_number = {"adamw": 8, "adamw8bit": 2, "muon": 4}[optimizer]
    return {
        "weights": weights,
        "gradients": 4 * learns,
        "optimizer": per_number * learns,
        "running mean": 4 * learns if average else 0,
    }
