"""Training data of a few small pictures, with encoders that count what they are asked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from liftkit.data import demo
from liftkit.data.batch import Batch
from liftkit.data.captioned import CaptionedSource
from liftkit.data.training import TrainingData
from liftkit.progress import Silent
from liftkit.tally import Tally

SIDE = 16


def picture(seed: int, height: int = SIDE, width: int = SIDE) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def fill(folder: Path, count: int, size: Callable[[int], tuple[int, int]] = lambda index: (SIDE, SIDE)) -> Path:
    folder.mkdir(exist_ok=True)
    for index in range(count):
        picture(index, *size(index)).save(folder / f"{index:03d}.png")
        (folder / f"{index:03d}.txt").write_text(f"caption {index % 5}\n")
    return folder


def pairs(folder: Path, count: int = 8, column: str = "reference", **changes: Any) -> Path:
    """Images ``after/N.png`` made from ``before/N.png``; ``changes`` replace the column of a line, by ``lineN``."""
    lines = []
    for name, seed in (("before", 100), ("after", 200)):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            picture(seed + index).save(folder / name / f"{index}.png")
    for index in range(count):
        line = {"file_name": f"after/{index}.png", "text": f"edit {index}", column: f"before/{index}.png"}
        lines.append(json.dumps({**line, column: changes.get(f"line{index}", line[column])}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def digits_from_digits(folder: Path, count: int = 4) -> Path:
    """Digits ``bN.png`` made from other digits, ``aN.png``, all with one prompt."""
    folder.mkdir()
    lines = []
    for index in range(count):
        for name, number in (("a", index), ("b", index + 50)):
            Image.fromarray(demo.image_at(number)[0]).save(folder / f"{name}{index}.png")
        lines.append({"file_name": f"b{index}.png", "text": "another digit", "reference": f"a{index}.png"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Forty captioned images of 16 x 16."""
    return fill(tmp_path / "images", 40)


@dataclass
class Encoders:
    """A VAE and a text encoder that count."""

    calls: list[Tensor] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    interrupt_at: int | None = None

    def image(self) -> Callable[[Tensor], Tensor]:
        return self.encode

    def encode(self, images: Tensor) -> Tensor:
        if len(self.calls) == self.interrupt_at:
            raise KeyboardInterrupt
        self.calls.append(images)
        return F.avg_pool2d(images, 2)

    def prompt(self) -> Callable[[list[str]], dict[str, Tensor]]:
        return self.embed

    def embed(self, prompts: list[str]) -> dict[str, Tensor]:
        self.prompts += prompts
        return {"encoder_hidden_states": torch.stack([embedding(prompt) for prompt in prompts])}

    @property
    def images(self) -> int:
        """Different images that were encoded."""
        return len({image.numpy().tobytes() for call in self.calls for image in call})


def embedding(prompt: str) -> Tensor:
    seed = int(hashlib.sha256(prompt.encode()).hexdigest()[:8], 16)
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(seed)).bfloat16()


class Notes(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def training(
    *sources: CaptionedSource | tuple[CaptionedSource, float], cache: Path, ready: bool = True, **changes: Any
) -> TrainingData:
    choices = {
        "resolution": SIDE,
        "multiple": 4,
        "buckets": False,
        "batch_size": 4,
        "seed": 0,
        "prompt_dropout": 0.1,
        "workers": 2,
    }
    weighted = [source if isinstance(source, tuple) else (source, 1.0) for source in sources]
    data = TrainingData(weighted, cache=cache, **{**choices, **changes})
    if ready:
        prepare(data, Encoders())
    return data


def prepare(data: TrainingData, encoders: Encoders, vae: str = "vae", observer: Any = None) -> Tally:
    return data.prepare(encoders.image, vae, encoders.prompt, "text", observer)


def assert_same(a: Batch, b: Batch) -> None:
    assert torch.equal(a.images, b.images)
    assert a.latents is not None
    assert b.latents is not None
    assert torch.equal(a.latents, b.latents)
    assert a.prompts.keys() == b.prompts.keys()
    assert all(torch.equal(a.prompts[name], b.prompts[name]) for name in a.prompts)
    assert (a.captions, a.indices) == (b.captions, b.indices)
