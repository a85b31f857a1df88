"""How much memory this process takes; what a run would take is in :mod:`liftkit.finetune.estimates`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any


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
