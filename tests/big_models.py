"""Sharded models, and spoiled ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from safetensors.torch import load_file, save_file

import liftkit
from liftkit.checkpoint.model import STEM

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def shards(model_folders: dict[str, Path], tmp_path: Path) -> Path:
    """The tiny klein in many shards, in bfloat16."""
    from diffusers import Flux2Transformer2DModel

    folder = tmp_path / "sharded"
    folder.mkdir()
    for path in model_folders["flux2"].iterdir():
        if path.name != "transformer":
            (folder / path.name).symlink_to(path) if path.is_file() else copy_tree(path, folder / path.name)
    (folder / "model_index.json").unlink()
    (folder / "model_index.json").write_bytes((model_folders["flux2"] / "model_index.json").read_bytes())
    model = Flux2Transformer2DModel.from_pretrained(model_folders["flux2"], subfolder="transformer")
    model.to(torch.bfloat16).save_pretrained(folder / "transformer", max_shard_size="30KB")
    return folder


def copy_tree(source: Path, target: Path) -> None:
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())


def convert(model: Path, output: Path, lift: Path, **choices: Any) -> Any:
    return liftkit.convert(str(model), output, **{"lift": lift, "device": "cpu", "proof": "projections", **choices})


def manifest(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): f"blake3:{blake3(path.read_bytes()).hexdigest()}" for path in files}


def spoil(shards: Path, name: str, place: Any, value: float) -> str:
    """Put a value somewhere into a tensor of a sharded transformer; the shard's name."""
    index = json.loads((shards / "transformer" / f"{STEM}.safetensors.index.json").read_text())
    shard: str = index["weight_map"][name]
    tensors = load_file(shards / "transformer" / shard)
    tensors[name][place] = value
    save_file(tensors, shards / "transformer" / shard, {"format": "pt"})
    return shard
