"""Conversions by the command line, for tests."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

Cli = Callable[..., tuple[int, str, str]]
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def model(architecture: str, model_folders: dict[str, Path]) -> Path:
    return model_folders[architecture]


@pytest.fixture
def klein(model_folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the tiny klein that a test may spoil."""
    return Path(shutil.copytree(model_folders["flux2"], tmp_path / "klein"))


def failed(result: tuple[int, str, str], *expected: str, code: int = 2) -> None:
    """One clear line on stderr, the exit code, no traceback."""
    status, _, err = result
    assert status == code, err
    lines = [line for line in err.splitlines() if line.startswith("error")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    for text in expected:
        assert text in lines[0], lines[0]
