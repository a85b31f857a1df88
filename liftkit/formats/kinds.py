"""What a thing to import is: told by its content, not by its name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from liftkit.checkpoint.header import read_header
from liftkit.checkpoint.source import PICKLES
from liftkit.errors import UsageError
from liftkit.formats.lora import is_lora

Kind = Literal["adapter", "lora", "checkpoint"]


def kind_of(source: str) -> Kind:
    """``adapter`` for a folder or a Hub id, ``lora`` or ``checkpoint`` for a .safetensors file.

    Raises:
        UsageError: if it is a file of another format.
    """
    path = Path(os.path.expanduser(source))
    if not path.is_file():
        return "adapter"
    if path.suffix in PICKLES:
        raise UsageError(f"{source}: a pickle, which liftkit never opens; save it as safetensors first")
    if path.suffix != ".safetensors":
        raise UsageError(f"{source}: expected a folder or a .safetensors file, found {path.suffix or 'no ending'}")
    return "lora" if is_lora(list(read_header(path).tensors)) else "checkpoint"
