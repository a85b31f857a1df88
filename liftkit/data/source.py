"""What training asks of its images and captions, and what all sources of encoded pictures share."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from liftkit.data.images import covered, read_picture
from liftkit.errors import UsageError

Size = tuple[int, int]
"""Height and width in pixels."""
CAPTION_KEYS = ("text", "caption", "prompt")
"""Where metadata keep a caption, the first that is there."""


class CaptionedSource(Protocol):
    """Images with captions, at random access. A picture that cannot be read raises one of :data:`BROKEN
    <liftkit.data.images.BROKEN>` from ``stamp``, ``key``, ``size`` or ``image``."""

    name: str

    def __len__(self) -> int: ...

    def label(self, index: int) -> str:
        """What to call an image in messages."""

    def stamp(self, index: int) -> str | None:
        """Cheap, and another one wherever the content may be another; None where it cannot change nor be broken."""

    def key(self, index: int) -> str:
        """The content's identity: another content, another key, wherever it lies."""

    def size(self, index: int) -> Size:
        """Height and width of the upright picture, without decoding it."""

    def image(self, index: int, size: Size) -> Tensor:
        """The picture resized to cover ``size`` and cropped about its centre: uint8 (3, height, width)."""

    def caption(self, index: int) -> str:
        """Its caption; empty where it has none."""

    def describe(self) -> dict[str, Any]:
        """Plain data for reports."""


class EncodedSource(ABC):
    """Pictures as encoded files: subclasses say where their bytes are."""

    @abstractmethod
    def content(self, index: int) -> bytes:
        """The picture's file.

        Raises:
            OSError: if it cannot be read.
        """

    def key(self, index: int) -> str:
        """SHA-256 of the file."""
        return hashlib.sha256(self.content(index)).hexdigest()

    def size(self, index: int) -> Size:
        """See :class:`CaptionedSource`; from the file's header."""
        from PIL import ExifTags, Image

        with Image.open(BytesIO(self.content(index))) as opened:
            width, height = opened.size
            # The base class's, for PNG's own decodes the picture.
            orientation = Image.Image.getexif(opened).get(ExifTags.Base.Orientation)
        return (width, height) if orientation in (5, 6, 7, 8) else (height, width)

    def image(self, index: int, size: Size) -> Tensor:
        """See :class:`CaptionedSource`."""
        # JPEG's own reduction down to twice the size cannot be told from Lanczos over all pixels.
        return covered(read_picture(BytesIO(self.content(index)), 2 * max(size)), *size)


def file_stamp(path: Path) -> str:
    """A file's place, size and time of change.

    Raises:
        OSError: if it is gone.
    """
    status = path.stat()
    return f"{path.resolve()}|{status.st_size}|{status.st_mtime_ns}"


def caption_of(entry: dict[str, Any]) -> str:
    """The caption of a line of metadata, empty where it has none; of several in a list, the first."""
    found = next((entry[key] for key in CAPTION_KEYS if entry.get(key) is not None), "")
    return plain_caption(found)


def plain_caption(value: Any) -> str:
    """What a column or a file holds as one caption."""
    if isinstance(value, (list, tuple)):
        value = value[0] if value else ""
    return "" if value is None else str(value).strip()


def read_text(path: Path) -> str:
    """A small text file.

    Raises:
        UsageError: if it is no UTF-8.
    """
    return decoded_text(path.read_bytes(), str(path))


def decoded_text(raw: bytes, where: str) -> str:
    """Text from bytes, with or without a byte-order mark.

    Raises:
        UsageError: naming ``where``, if it is no UTF-8.
    """
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{where}: no UTF-8 text ({error.reason} at byte {error.start}); save it in that encoding"
        ) from error
