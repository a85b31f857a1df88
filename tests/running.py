"""What test processes run, and what they have to leave; imports little, so that they begin at once."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

import liftkit
from liftkit.checkpoint.folder import digests
from liftkit.errors import LiftkitError

PRELOAD = [
    "tests.running",
    "tests.tiny",
    "liftkit.conversion.execute",
    "liftkit.models.autoencoder",
    "matplotlib.figure",
    "matplotlib.backends.backend_svg",
]
"""With the stock pipelines' classes among them: without, each conversion asks a process of its own whether they load."""


def convert(model: str, output: str, lift: str, overwrite: bool) -> None:
    """Convert and end the process: exit code 0, or 3 where the conversion said no."""
    torch.set_num_threads(1)
    try:
        liftkit.convert(model, output, lift=Path(lift), overwrite=overwrite, device="cpu", proof="projections")
    except LiftkitError as error:
        os.write(2, f"{error}\n".encode())
        os._exit(3)
    os._exit(0)


def is_complete(folder: Path) -> bool:
    """Whether a folder is what its manifest says, no more and no less."""
    record = json.loads((folder / "liftkit.json").read_text())
    found = {name: digest.value for name, digest in digests(folder).items() if name != "liftkit.json"}
    return record["digests"] == found
