"""Images with captions for training: the demo data, folders, and (from their own modules) tar shards and datasets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from liftkit.data import demo
from liftkit.data.hub import HubDataset
from liftkit.data.images import covered, picture_files
from liftkit.data.shards import WebDataset
from liftkit.data.source import CaptionedSource, EncodedSource, Size, caption_of, file_stamp, read_text
from liftkit.errors import UsageError

__all__ = ["CaptionedFolder", "CaptionedSource", "DemoCaptioned", "HubDataset", "WebDataset"]

METADATA = "metadata.jsonl"


class DemoCaptioned:
    """The embedded demo data, drawn when asked for.

    Args:
        count: how many images.
        split: ``train`` or ``heldout``.
        seed: of the data.
    """

    def __init__(self, count: int, split: demo.Split = "train", seed: int = 0) -> None:
        if count < 1:
            raise UsageError(f"demo data: {count} images; at least one is needed")
        self.count, self.split, self.seed = count, split, seed
        self.name = "demo"

    def __len__(self) -> int:
        return self.count

    def label(self, index: int) -> str:
        """See :class:`CaptionedSource`."""
        return self.key(index)

    def stamp(self, index: int) -> None:  # noqa: ARG002
        """See :class:`CaptionedSource`."""
        return

    def key(self, index: int) -> str:
        """See :class:`CaptionedSource`."""
        return f"demo/{self.seed}/{self.split}/{index}"

    def size(self, index: int) -> Size:  # noqa: ARG002
        """See :class:`CaptionedSource`."""
        return demo.SIZE, demo.SIZE

    def image(self, index: int, size: Size) -> Tensor:
        """See :class:`CaptionedSource`."""
        from PIL import Image

        drawn, _ = demo.image_at(index, split=self.split, seed=self.seed)
        if size == self.size(index):
            return torch.from_numpy(np.ascontiguousarray(drawn.transpose(2, 0, 1)))
        return covered(Image.fromarray(drawn), *size)

    def caption(self, index: int) -> str:
        """See :class:`CaptionedSource`."""
        return demo.scene_at(index, split=self.split, seed=self.seed).prompt

    def describe(self) -> dict[str, Any]:
        """See :class:`CaptionedSource`."""
        return {"source": "demo", "name": self.name, "images": self.count, "split": self.split, "seed": self.seed}


class CaptionedFolder(EncodedSource):
    """All images below a folder, in the order of their names.

    A caption stands in a text file beside its image, ``flower.txt`` for ``flower.png``, or else in a
    ``metadata.jsonl`` in any folder above it, one ``{"file_name": ..., "text": ...}`` a line (as the Hub's image folders
    have it). An image with neither has the empty caption.

    Args:
        path: the folder.

    Raises:
        UsageError: if it is missing, holds no image, or its metadata are broken.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        if not self.path.is_dir():
            raise UsageError(f"{path}: no such folder; give a folder of images and captions")
        self.files = picture_files(self.path)
        if not self.files:
            raise UsageError(f"{path}: no image files (.png, .jpg, .webp, .tif, ...) in this folder")
        self.name = self.path.resolve().name
        self.captions: dict[Path, str] = {}
        for metadata in sorted(self.path.rglob(METADATA), key=lambda file: len(file.parts)):
            self.captions |= _read_metadata(metadata)

    def __len__(self) -> int:
        return len(self.files)

    def label(self, index: int) -> str:
        """See :class:`CaptionedSource`: the path within the folder."""
        return self.files[index].relative_to(self.path).as_posix()

    def stamp(self, index: int) -> str:
        """See :class:`CaptionedSource`."""
        return file_stamp(self.files[index])

    def content(self, index: int) -> bytes:
        """See :class:`EncodedSource`."""
        return self.files[index].read_bytes()

    def caption(self, index: int) -> str:
        """See :class:`CaptionedSource`."""
        beside = self.files[index].with_suffix(".txt")
        if beside.is_file():
            return read_text(beside).strip()
        return self.captions.get(self.files[index], "")

    def describe(self) -> dict[str, Any]:
        """See :class:`CaptionedSource`."""
        return {"source": "folder", "name": self.name, "images": len(self)}


def _read_metadata(path: Path) -> dict[Path, str]:
    """Captions by image file."""
    found = {}
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            name = entry["file_name"]
            found[path.parent / name] = caption_of(entry)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise UsageError(
                f'{path}:{number}: expected {{"file_name": "...", "text": "..."}}, found {line[:60]!r}'
            ) from error
    return found
