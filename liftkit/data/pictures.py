"""The one reader of pictures: what fits, training, comparisons, shards and datasets see of a file.

A picture is upright, in sRGB by the profile of its file, in eight bits a channel, on white where it is transparent, and
the first frame of an animation. Its content says what it is, not the ending of its name. Whatever cannot be read raises
:class:`PictureError` with a reason that a tally can count.
"""

from __future__ import annotations

import io
import struct
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from liftkit.checkpoint.source import open_regular
from liftkit.data.picture_color import declared_profile, png_chunks, to_srgb
from liftkit.data.picture_depth import NotFinite, eight_bits, low_bytes, on_white, transparent_sample, white_is_zero
from liftkit.data.picture_errors import (
    DAMAGED,
    NO_MEMORY,
    NO_PERMISSION,
    NO_PICTURE,
    TOO_LARGE,
    PictureError,
    explained,
)
from liftkit.data.picture_kinds import FORMATS, HEAD, declared_size, format_of, refusal, register
from liftkit.errors import UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

READER = "pictures/4"
"""Part of the identity of whatever is made of a picture: another reader may see other pixels in the same file."""
MOST_PIXELS = 2**28
"""Of one picture, as it is decoded; a JPEG may be decoded at a fraction of its size."""
MOST_JPEG_PIXELS = 2**30
"""Of a JPEG before that reduction, which takes time."""
PIXELS_IN_FLIGHT = 2**27
"""Of all pictures that are being decoded; a larger one is decoded alone."""


class _InFlight:
    """A limit on pixels that are decoded at the same time, in all threads."""

    def __init__(self, pixels: int) -> None:
        self.pixels = pixels
        self._held = 0
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, pixels: int) -> Iterator[None]:
        """Wait until there is room for some pixels, or nobody else has any."""
        with self._changed:
            self._changed.wait_for(lambda: self._held == 0 or self._held + pixels <= self.pixels)
            self._held += pixels
        try:
            yield
        finally:
            with self._changed:
                self._held -= pixels
                self._changed.notify_all()


_in_flight = _InFlight(PIXELS_IN_FLIGHT)
_opening = threading.Lock()


@dataclass(frozen=True)
class Look:
    """What the header of a picture says.

    Args:
        height, width: of the upright picture, in pixels.
        remark: what people may want to know of how its colors are read; empty if nothing.
    """

    height: int
    width: int
    remark: str = ""


def look(file: IO[bytes], name: str) -> Look:
    """The header of a picture, without decoding it.

    Raises:
        PictureError: if there is none.
    """
    with _opened(file, name) as opened:
        with explained(name):
            _, remark = declared_profile(opened, file)
            orientation = _orientation(opened, file)
        width, height = _stored_size(opened)
        return Look(width, height, remark) if orientation >= 5 else Look(height, width, remark)


def read_picture(file: IO[bytes], name: str, resolution: int) -> Image:
    """What :func:`decoded` gives, to keep."""
    with decoded(file, name, resolution) as image:
        return image


@contextmanager
def decoded(file: IO[bytes], name: str, resolution: int) -> Iterator[Image]:
    """A picture in sRGB, upright, and on white where it is transparent. Within the block it counts as one in flight: make
    it smaller there, and do not keep it.

    Args:
        file: from the beginning.
        name: what to call it in messages.
        resolution: a JPEG may be decoded at a reduced size, with neither side under this.

    Raises:
        PictureError: if it cannot be read.
    """
    with ExitStack() as stack:
        opened = stack.enter_context(_opened(file, name))
        with explained(name):
            profile, _ = declared_profile(opened, file)
            full = opened.size
            opened.draft("RGB" if opened.mode == "YCbCr" else opened.mode, (resolution, resolution))
            # A progressive JPEG is held in memory whole, whatever is made of it.
            largest = opened.size if not opened.info.get("progressive") else full
        _check_size(largest, MOST_PIXELS, name)
        if declared_size(_head(file)) is None:  # else its place is held already
            stack.enter_context(_in_flight.hold(largest[0] * largest[1]))
        with explained(name):
            transparent = transparent_sample(opened)
            negative, tiles = white_is_zero(opened), list(opened.tile)
            opened.load()
            low = low_bytes(opened, tiles, file)
            orientation = _orientation(opened)
        try:
            exact = opened.format in ("PNG", "PPM")
            image, alpha = eight_bits(opened, transparent, exact, negative, low)
            image = _upright(on_white(to_srgb(image, profile), alpha), orientation)
        except NotFinite as error:
            raise PictureError(name, str(error)) from error
        except MemoryError as error:
            raise PictureError(name, NO_MEMORY) from error
        yield image


@contextmanager
def open_picture_file(path: Path, name: str) -> Iterator[IO[bytes]]:
    """A file for :func:`look` and :func:`read_picture`.

    Raises:
        PictureError: if it is gone, no regular file, or may not be read.
    """
    with ExitStack() as stack:
        try:
            file = stack.enter_context(open_regular(path))
        except UsageError as error:
            raise PictureError(name, _why_not_opened(error)) from error
        yield io.BufferedReader(cast(io.RawIOBase, file))


def _why_not_opened(error: UsageError) -> str:
    cause = error.__cause__
    if isinstance(cause, PermissionError):
        return NO_PERMISSION
    if isinstance(cause, FileNotFoundError):
        return "gone"
    return "no regular file" if cause is None else f"not readable ({getattr(cause, 'strerror', None) or cause})"


@contextmanager
def _opened(file: IO[bytes], name: str) -> Iterator[Any]:
    """A picture opened by Pillow."""
    from PIL import Image

    with ExitStack() as stack:
        with explained(name):
            head = _head(file)
        refused = refusal(head)
        if refused:
            raise PictureError(name, refused)
        known = format_of(head)
        early = declared_size(head)
        if early is not None:
            _check_size(early, MOST_PIXELS, name)
            stack.enter_context(_in_flight.hold(early[0] * early[1]))
        with explained(name, unidentified=_unidentified(known)):
            register(known)
            # The limits here are tighter than Pillow's own, except for JPEG, which may be decoded smaller.
            with _opening:
                limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
                try:
                    opened = stack.enter_context(Image.open(file, formats=_formats(known, name)))
                finally:
                    Image.MAX_IMAGE_PIXELS = limit
            is_raw = 50706 in getattr(opened, "tag_v2", {})  # the DNG version
        if is_raw:
            raise PictureError(name, "camera raw: develop it to JPEG or TIFF")
        _check_size(opened.size, MOST_JPEG_PIXELS if opened.format in ("JPEG", "MPO") else MOST_PIXELS, name)
        yield opened


def _formats(known: str | None, name: str) -> tuple[str, ...]:
    """The formats that a file may have; TGA has no mark of its own, so there the name counts."""
    if known is not None:
        return {"JPEG": ("JPEG", "MPO"), "BMP": ("BMP", "DIB")}.get(known, (known,))
    is_targa = name.lower().endswith((".tga", ".icb", ".vda", ".vst"))
    return tuple(each for each in FORMATS if each not in ("HEIF", "JXL", "MPO") and (each != "TGA" or is_targa))


def _unidentified(known: str | None) -> str:
    """Why Pillow does not open a file that begins as one of a format does."""
    if known == "TIFF":
        return "a TIFF that is damaged, or of a kind that is not read: save it with 8 or 16 bits a channel"
    return NO_PICTURE if known is None else f"damaged {known}"


def _head(file: IO[bytes]) -> bytes:
    file.seek(0)
    head = file.read(HEAD)
    file.seek(0)
    return head


def _check_size(size: tuple[int, int], most: int, name: str) -> None:
    width, height = size
    if width * height > most:
        raise PictureError(name, TOO_LARGE, f"{width} x {height} pixels; {most / 1e6:.0f} million at most")
    if width < 1 or height < 1:
        raise PictureError(name, DAMAGED, f"{width} x {height} pixels")


def _stored_size(opened: Any) -> tuple[int, int]:
    """Width and height before the picture is turned: of TIFFs, Pillow states those of the upright picture."""
    if opened.format == "TIFF":
        return int(opened.tag_v2[256]), int(opened.tag_v2[257])
    return int(opened.size[0]), int(opened.size[1])


def _orientation(opened: Any, file: IO[bytes] | None = None) -> int:
    """Exif's, from 1 to 8; 1 where the decoder has turned the picture already.

    Args:
        opened: by Pillow.
        file: its file, whose place is changed, where the picture is not decoded: a PNG may have its Exif after its pixels.
    """
    from PIL import ExifTags, Image

    if file is not None and opened.format == "PNG" and "exif" not in opened.info:
        late = next((body for kind, body in png_chunks(file, (b"eXIf",))), None)
        if late is not None:
            opened.info["exif"] = b"Exif\0\0" + late
    if opened.format == "HEIF" or (opened.format == "JXL" and not opened.jpeg):
        return 1
    try:
        # The base class's, for PNG's own decodes the picture.
        found = Image.Image.getexif(opened).get(ExifTags.Base.Orientation)
    except (OSError, ValueError, SyntaxError, TypeError, LookupError, RuntimeError, struct.error):
        return 1  # broken Exif turns nothing
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def _upright(image: Image, orientation: int) -> Image:
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    return image.transpose(turns[orientation]) if orientation in turns else image
