"""Images with captions for training: the demo data, folders, and (from their own modules) tar shards and datasets."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from liftkit.checkpoint.source import open_regular
from liftkit.checkpoint.text import read_text, stream_lines
from liftkit.data import demo
from liftkit.data.captions import (
    CAPTION_LIMIT,
    NOT_TAKEN,
    Captions,
    caption_in,
    looks_like_captions,
    metadata_kind,
    plain_name,
    read_metadata,
    sidecars,
)
from liftkit.data.hub import HubDataset
from liftkit.data.images import check_folder, covered, no_pictures
from liftkit.data.picture_files import scan
from liftkit.data.pictures import open_picture_file
from liftkit.data.shards import WebDataset
from liftkit.data.source import CaptionedSource, EncodedSource, Size, file_stamp
from liftkit.errors import UsageError
from liftkit.tally import Tally

__all__ = ["CaptionedFolder", "CaptionedSource", "DemoCaptioned", "HubDataset", "WebDataset"]


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
        self.tally = Tally("images")
        self.texts: list[Tally] = []

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

    def remark(self, index: int) -> str:  # noqa: ARG002
        """See :class:`CaptionedSource`."""
        return ""

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

    def has_captions(self) -> bool:
        """See :class:`CaptionedSource`."""
        return True

    def describe(self) -> dict[str, Any]:
        """See :class:`CaptionedSource`."""
        return {"source": "demo", "name": self.name, "images": self.count, "split": self.split, "seed": self.seed}


class CaptionedFolder(EncodedSource):
    """All images below a folder, in the order of their names.

    A caption stands in a file beside its image (``flower.txt``, ``flower.caption`` or ``flower.json`` for ``flower.png``, or
    ``flower.png.txt``), or else in a ``metadata.jsonl`` or ``metadata.csv`` in any folder above it, one
    ``{"file_name": ..., "text": ...}`` a line (as the Hub's image folders have it); the innermost goes first. An image with
    neither has the empty caption.

    Args:
        path: the folder.

    Attributes:
        texts: accounts of the lines of metadata, and of caption files.

    Raises:
        UsageError: if it is missing, holds no image, or its metadata are broken.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        check_folder(self.path, str(path), "give a folder of images and captions")
        found = scan(self.path)
        self.files, self.tally = found.pictures, found.tally
        if not self.files:
            raise UsageError(f"{path}: {no_pictures(found.tally)}")
        self.name = self.path.resolve().name
        self._names = [self._plain(file) for file in self.files]
        others = {self._plain(file): file for file in found.others}
        beside, left = sidecars(self._names, others)
        self._beside = {picture: others[text] for picture, text in beside.items()}
        self._captions = Captions(self._names)
        tables = [name for name in others if metadata_kind(name)]
        for name in sorted(tables, key=lambda name: (name.count("/"), name)):
            self._read_metadata(name, others[name])
        files = Tally("caption files", used=len(set(beside.values())) + len(tables))
        for name in others:
            if name not in tables and name not in beside.values() and looks_like_captions(name):
                files.leave_out(name, left.get(name, NOT_TAKEN))
        self.texts = [self._captions.lines, files]

    def __len__(self) -> int:
        return len(self.files)

    def label(self, index: int) -> str:
        """See :class:`CaptionedSource`: the path within the folder."""
        return self.files[index].relative_to(self.path).as_posix()

    def stamp(self, index: int) -> str:
        """See :class:`CaptionedSource`."""
        return file_stamp(self.files[index], self.label(index))

    def open(self, index: int) -> AbstractContextManager[IO[bytes]]:
        """See :class:`EncodedSource`."""
        return open_picture_file(self.files[index], self.label(index))

    def caption(self, index: int) -> str:
        """See :class:`CaptionedSource`."""
        name = self._names[index]
        beside = self._beside.get(name)
        if beside is not None:
            found = caption_in(read_text(beside, CAPTION_LIMIT), str(beside))
            if not found and found is not None:
                self.empty_caption(self._plain(beside))
            if found is not None:
                return found
            self.without_caption(self._plain(beside))
        return self._captions.get(name)

    def describe(self) -> dict[str, Any]:
        """See :class:`CaptionedSource`."""
        return {"source": "folder", "name": self.name, "images": len(self)}

    def _read_metadata(self, name: str, path: Path) -> None:
        with open_regular(path) as file:
            entries = read_metadata(metadata_kind(name) or "", stream_lines(file, str(path)), str(path))
            self._captions.add(name.rpartition("/")[0], entries, name)

    def _plain(self, path: Path) -> str:
        return plain_name(path.relative_to(self.path).as_posix())
