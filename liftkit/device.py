"""Where models run: the device of ``--device``, and the memory that is free there."""

from __future__ import annotations

import os
import re
from pathlib import Path

from liftkit.errors import UsageError


def choose_device(wanted: str) -> tuple[str, str]:
    """The device of ``--device`` and why.

    Raises:
        UsageError: if it is unknown or not there.
    """
    import torch

    if wanted == "auto":
        for name, there in (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available())):
            if there:
                return name, f"{name} is available"
        return "cpu", "no GPU is available"
    try:
        torch.empty(1, device=wanted).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(
            f"--device {wanted}: not available here ({str(error).splitlines()[0]}); try auto or cpu"
        ) from error
    return wanted, "as asked"


def launched_on_cpu() -> bool:
    """True in each of several processes that share the work of a machine without a GPU (``WORLD_SIZE`` above 1).

    accelerate takes each of them for the only one unless it is given ``cpu=True``.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return False
    import torch

    return not torch.accelerator.is_available() or torch.backends.mps.is_available()


def available_memory(device: str) -> int:
    """Bytes that can be had on a device without pushing others out; on the CPU, within the container's limit."""
    if device.startswith("cuda"):
        import torch

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
