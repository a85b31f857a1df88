"""Plain results of long work on disk, by what they follow from, so that a run that grew or was cut short goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from liftkit.checkpoint.files import write_text
from liftkit.checkpoint.model import read_json
from liftkit.errors import UsageError

Result = TypeVar("Result", bound=Any)


def remembered(folder: Path, key: dict[str, Any], kind: type[Result], make: Callable[[], Result]) -> Result:
    """A dataclass of plain data that follows from a key: read from a folder, or else made and written there.

    Args:
        folder: where results are kept.
        key: plain data, everything that the result depends on.
        kind: its class.
        make: does the work.
    """
    path = folder / f"{digest(key)[:32]}.json"
    if path.is_file():
        try:
            return kind(**read_json(path))
        except (UsageError, TypeError):  # a damaged file is made again
            path.unlink()
    made = make()
    write_text(path, json.dumps(asdict(made)) + "\n")
    return made


def digest(value: Any) -> str:
    """SHA-256 of plain data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's shape, dtype and bytes."""
    content = tensor.detach().cpu().contiguous()
    found = hashlib.sha256(f"{tuple(content.shape)} {content.dtype}".encode())
    found.update(content.numpy().data)
    return found.hexdigest()
