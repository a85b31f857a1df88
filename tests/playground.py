"""Models on the shelf of liftkit try."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from liftkit.evaluate.entries import open_entry
from liftkit.options import Guidance, SampleOptions
from liftkit.playground.shelf import Shelf

BASE = "tiny-klein"
PROMPT = "a red seven"
ASKED = SampleOptions(seed=3, steps=3, guidance=Guidance(3.0))


@pytest.fixture(scope="module", autouse=True)
def _collected() -> Iterator[None]:
    """What Gradio leaves is collected here, so that no other test is blamed for it."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture(scope="module")
def models(pixel_klein: Path) -> Shelf:
    return Shelf([open_entry("demo"), open_entry(str(pixel_klein))], "cpu")


def quiet(*_: Any) -> None:
    """Observes nothing."""


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "given" / "start.png"
    path.parent.mkdir()
    Image.new("RGB", (96, 80), "orange").save(path)
    return path
