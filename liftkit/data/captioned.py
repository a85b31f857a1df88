"""Images with captions for training: the demo data, folders, and (from their own modules) tar shards and datasets."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from liftkit.checkpoint.files import expanded
from liftkit.checkpoint.source import open_regular
from liftkit.data import demo
from liftkit.data.caption_files import CaptionFiles
from liftkit.data.captions import plain_name
from liftkit.data.hub import HubDataset
from liftkit.data.images import check_folder, covered, no_pictures
from liftkit.data.picture_files import scan
from liftkit.data.pictures import PictureError, open_picture_file
from liftkit.data.shards import WebDataset
from liftkit.data.source import CaptionedSource, EncodedSource, Size, file_stamp
from liftkit.errors import UsageError
from liftkit.tally import Tally

__all__ = ["CaptionedFolder", "CaptionedSource", "DemoCaptioned", "HubDataset", "WebDataset"]


class DemoCaptioned(CaptionedSource):
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


class PictureFiles(EncodedSource):
    """Picture files without captions.

    Args:
        path: the folder that their names begin at.
        files: below it.
    """

    def __init__(self, path: Path, files: list[Path]) -> None:
        self.path, self.files = path, files
        self.name = path.resolve().name
        self.tally = Tally("images")
        self.texts = []

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

    def caption(self, index: int) -> str:  # noqa: ARG002
        """See :class:`CaptionedSource`."""
        return ""

    def describe(self) -> dict[str, Any]:
        """See :class:`CaptionedSource`."""
        return {"source": "folder", "name": self.name, "images": len(self)}


class CaptionedFolder(PictureFiles):
    """All images below a folder, in the order of their names.

    A caption stands in a file beside its image (``flower.txt``, ``flower.caption`` or ``flower.json`` for ``flower.png``, or
    ``flower.png.txt``), or else in a ``metadata.jsonl`` or ``metadata.csv`` in any folder above it, one
    ``{"file_name": ..., "text": ...}`` a line (as the Hub's image folders have it); the innermost goes first. An image with
    neither has the empty caption.

    Args:
        path: the folder.
        by_folder: the caption is the name of the first folder below ``path`` that holds the image, as ImageNet has its classes;
            files of captions are not looked for.
        reference_column: of the metadata: the picture that an image was made from, or a list of those, by their names as
            ``file_name`` has them. Pictures that are only references are no images of the source.

    Attributes:
        texts: accounts of the lines of metadata, and of caption files.

    Raises:
        UsageError: if it is missing, holds no image, its metadata are broken, or no line has a reference where a column is given.
    """

    def __init__(self, path: str | Path, reference_column: str | None = None, *, by_folder: bool = False) -> None:
        folder = expanded(path)
        check_folder(folder, str(path), "give a folder of images and captions")
        found = scan(folder)
        super().__init__(folder, found.pictures)
        self.tally = found.tally
        if not self.files:
            raise UsageError(f"{path}: {no_pictures(found.tally)}")
        self._names = [plain_name(self.label(index)) for index in range(len(self.files))]
        self.by_folder = by_folder
        if by_folder:
            self._check_folders(str(path))
            if reference_column is not None:
                raise UsageError(
                    f"{path}: reference_column {reference_column!r} is one of metadata; it goes with captions: files"
                )
            return
        others = {plain_name(file.relative_to(self.path).as_posix()): file for file in found.others}
        lines, files = self.texts = [Tally("lines of metadata"), Tally("caption files")]
        self._captions = CaptionFiles(
            self._names,
            others,
            lambda name: open_regular(others[name]),
            lambda name: str(others[name]),
            str,
            lines,
            files,
            reference_column=reference_column,
        )
        if reference_column is not None:
            self._set_apart(reference_column)

    def _set_apart(self, column: str) -> None:
        """Make the pictures that are only references a source of their own."""
        named = {name: self._captions.references(name) for name in self._names}
        wanted = {picture for references in named.values() for _, picture, _ in references if picture is not None}
        if not any(named.values()):
            raise UsageError(
                f"{self.path}: no line of metadata has a {column!r}, which names the picture, or a list of pictures, that its "
                "file_name was made from"
            )
        files = dict(zip(self._names, self.files))
        order = sorted(wanted)
        self.references = PictureFiles(self.path, [files[name] for name in order])
        self._places = {name: place for place, name in enumerate(order)}
        for name in wanted:
            if not named[name] and not self._captions.of(name):
                self.tally.leave_out(name, "references of others")
                del files[name]
        self._names, self.files = list(files), list(files.values())

    def made_from(self, index: int) -> tuple[int, ...]:
        """See :class:`CaptionedSource`."""
        found = []
        for name, picture, why in self._captions.references(self._names[index]) if self.references is not None else ():
            if picture is None:
                raise PictureError(self.label(index), "made from pictures that are not there", f"{name}: {why}")
            found.append(self._places[picture])
        return tuple(found)

    def caption(self, index: int) -> str:
        """See :class:`CaptionedSource`."""
        if self.by_folder:
            return self._names[index].partition("/")[0]
        return self._captions.of(self._names[index])

    def _check_folders(self, where: str) -> None:
        """Raise unless every image is in a folder of a class."""
        loose = [name for name in self._names if "/" not in name]
        if loose:
            raise UsageError(
                f"{where}: {len(loose)} of {len(self._names)} images, such as {loose[0]}, are in no folder that names their class; "
                "move them into one, or take captions: files"
            )
