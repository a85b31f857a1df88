"""Safetensors files for tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

TENSORS = {
    "a": torch.arange(12.0).reshape(3, 4),
    "b": torch.arange(5).to(torch.int64),
    "c": torch.randn(2, 2).to(torch.bfloat16),
    "empty": torch.zeros(0, 3),
    "scalar": torch.tensor(2.0),
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source.safetensors"
    save_file(TENSORS, path, {"format": "pt", "note": "kept"})
    return path


def fill(folder: Path, *names: str) -> Path:
    folder.mkdir()
    for name in names:
        (folder / name).write_text("old")
    return folder


def content(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
