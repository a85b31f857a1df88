"""What training asks of its images and captions, and what all sources of encoded pictures share."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from liftkit.data.images import CROPS
from liftkit.data.picture_errors import PictureError
from liftkit.data.pictures import MOST_PIXELS, READER, decoded, look
from liftkit.tally import Tally

Size = tuple[int, int]
"""Height and width in pixels."""


class CaptionedSource(ABC):
    """Images with captions, at random access. A picture that cannot be used raises
    :class:`~liftkit.data.picture_errors.PictureError` from ``stamp``, ``key``, ``size``, ``remark`` or ``image``.

    Attributes:
        name: for messages.
        tally: of images that were left out when the source was opened, such as hidden ones; what is read is counted by
            whoever reads.
        texts: accounts of what holds captions: files and lines.
        references: the pictures that images were made from; None where none is.
    """

    name: str
    tally: Tally
    texts: list[Tally]
    references: CaptionedSource | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def key(self, index: int) -> str:
        """The content's identity: another content, another key, wherever it lies; another reader, another key."""

    @abstractmethod
    def size(self, index: int) -> Size:
        """Height and width of the upright picture, without decoding it."""

    @abstractmethod
    def image(self, index: int, size: Size) -> Tensor:
        """The picture resized to cover ``size`` and cropped about its center: uint8 (3, height, width)."""

    @abstractmethod
    def caption(self, index: int) -> str:
        """Its caption; empty where it has none.

        Raises:
            UsageError: if the text that holds it cannot be read.
        """

    def made_from(self, index: int) -> tuple[int, ...]:  # noqa: ARG002
        """The indices, within :attr:`references`, of the pictures that an image was made from.

        Raises:
            PictureError: if one of them is not there.
        """
        return ()

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Plain data for reports."""

    def label(self, index: int) -> str:
        """What to call an image in messages."""
        return self.key(index)

    def stamp(self, index: int) -> str | None:  # noqa: ARG002
        """Cheap, and another one wherever the content may be another; None where it cannot change nor be broken."""
        return None

    def remark(self, index: int) -> str:  # noqa: ARG002
        """What people may want to know of how a picture is read; empty if nothing."""
        return ""

    def has_captions(self) -> bool:
        """Whether any image of it has a caption."""
        return any(self.caption(index) for index in range(len(self)))


class EncodedSource(CaptionedSource):
    """Pictures as encoded files: subclasses say where their bytes are, and what to call them."""

    crop: str = "lanczos"
    """How pictures are brought to a size; of :data:`liftkit.data.images.CROPS`."""

    @abstractmethod
    def open(self, index: int) -> AbstractContextManager[IO[bytes]]:
        """The picture's file, at its beginning.

        Raises:
            PictureError: if it cannot be read.
        """

    def key(self, index: int) -> str:
        """The reader's name and the SHA-256 of the file."""
        with self.open(index) as file:
            return f"{READER}/{digest(file, self.label(index))}"

    def size(self, index: int) -> Size:
        """See :class:`CaptionedSource`; from the file's header."""
        with self.open(index) as file:
            found = look(file, self.label(index))
        return found.height, found.width

    def remark(self, index: int) -> str:
        """See :class:`CaptionedSource`; from the file's header."""
        with self.open(index) as file:
            return look(file, self.label(index)).remark

    def image(self, index: int, size: Size) -> Tensor:
        """See :class:`CaptionedSource`."""
        # JPEG's own reduction down to twice the size cannot be distinguished from Lanczos over all pixels.
        most = 2 * max(size) if self.crop == "lanczos" else MOST_PIXELS
        with self.open(index) as file, decoded(file, self.label(index), most) as image:
            return CROPS[self.crop](image, *size)


def digest(file: IO[bytes], name: str) -> str:
    """SHA-256 of a file.

    Raises:
        PictureError: if it cannot be read to its end.
    """
    found = hashlib.sha256()
    try:
        while part := file.read(1 << 20):
            found.update(part)
    except OSError as error:
        raise PictureError(name, f"not readable ({error.strerror or error})") from error
    return found.hexdigest()


def file_stamp(path: Path, name: str) -> str:
    """A file's place, size and time of change.

    Raises:
        PictureError: if it is gone.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise PictureError(name, "gone") from error
    return f"{path.resolve()}|{status.st_size}|{status.st_mtime_ns}"
