"""Pictures of any depth in eight bits a channel, with their alpha apart."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

ROWS = 256
_DEPTHS = (8, 10, 12, 14, 16, 24, 31, 32)
_SAMPLES = {"1": 255, "L;1": 255, "L;2": 85, "L;4": 17}
"""By how much Pillow multiplies gray samples of few bits, and not the one that means transparent."""
_WIDE = re.compile(r"(?:RGB[AX]?|CMYK);16([LBN])")
"""Pillow's names of samples of two bytes of which it keeps the high one: the little end first, the big one, or the machine's."""


class NotFinite(ValueError):
    """A picture of numbers some of which are NaN or infinite."""


def transparent_sample(opened: Any) -> Any:
    """The gray sample or color that means transparent, in the numbers that the decoded picture will have; or None.

    Args:
        opened: by Pillow, not decoded yet.
    """
    value = opened.info.get("transparency")
    if opened.format != "PNG" or value is None or not opened.tile:
        return value
    return value * _SAMPLES.get(_raw_mode(opened.tile[0]), 1) if isinstance(value, int) else value


def low_bytes(opened: Any, tiles: list[Any], file: IO[bytes]) -> Image | None:
    """The other bytes of a picture with 16 bits in each of several channels, of which Pillow keeps the high ones; None for
    another picture.

    Args:
        opened: by Pillow.
        tiles: that it had before it was decoded.
        file: its file, whose place is changed.
    """
    gray_alpha = [_raw_mode(tile) == "LA;16B" for tile in tiles]
    found = [_WIDE.fullmatch(_raw_mode(tile)) for tile in tiles]
    if not tiles or not (all(found) or all(gray_alpha)):
        return None
    file.seek(0)
    again = type(opened)(file)
    if all(found):
        again.tile = [_with_raw_mode(tile, _other_end(tile)) for tile in again.tile]
        again.load()
        return again
    # Pillow reads two samples of two bytes from one end alone. Four samples of one byte are the same bytes.
    again._mode = "RGBA"
    again.tile = [_with_raw_mode(tile, "RGBA") for tile in again.tile]
    again.load()
    from PIL import Image

    gray, alpha = again.getchannel(1), again.getchannel(3)
    return Image.merge("RGBA", (gray, gray, gray, alpha))


def _raw_mode(tile: Any) -> str:
    """How Pillow will read the samples of a part of a picture."""
    return str(tile[3][0] if isinstance(tile[3], tuple) else tile[3])


def _other_end(tile: Any) -> str:
    """How the samples of a part of a picture are read from the other end."""
    raw = _raw_mode(tile)
    end = {"L": "B", "B": "L", "N": "B" if sys.byteorder == "little" else "L"}[raw[-1]]
    return f"{raw[:-1]}{end}"


def _with_raw_mode(tile: Any, raw: str) -> Any:
    """A part of a picture whose samples are to be read in another way."""
    values = (*tile[:3], (raw, *tile[3][1:]) if isinstance(tile[3], tuple) else raw)
    return type(tile)(*values) if hasattr(tile, "_fields") else values


def white_is_zero(opened: Any) -> bool:
    """Whether a TIFF's zero means white, in a mode that Pillow does not turn round when it decodes.

    Args:
        opened: by Pillow, not decoded yet.
    """
    wide = opened.mode.startswith("I") or opened.mode == "F"
    return bool(opened.format == "TIFF" and wide and opened.tag_v2.get(262) == 0)


def eight_bits(
    image: Image, transparent: Any = None, exact: bool = False, negative: bool = False, low: Image | None = None
) -> tuple[Image, Image | None]:
    """A decoded picture with eight bits a channel.

    Samples of more bits are scaled by the range of their type. Where the largest is under a sixteenth of it, in a format
    that does not define what white is (``exact`` is false), the type is the smallest that holds them: such files have
    samples of 8 or 12 bits in larger numbers. Negative samples and floating-point ones above 1 are scaled by their own
    range.

    Args:
        image: in any of Pillow's modes.
        transparent: see :func:`transparent_sample`.
        exact: whether the whole range of the type counts: PNG and PNM say so.
        negative: see :func:`white_is_zero`.
        low: see :func:`low_bytes`; ``image`` has the high ones.

    Returns:
        The picture in L, RGB, CMYK, LAB, YCbCr or HSV, and its alpha in L; None where nothing is transparent.

    Raises:
        NotFinite: if floating-point samples are NaN or infinite.
    """
    alpha = None
    if low is not None:
        image, alpha = _of_two_bytes(image, low, exact, transparent)
    elif image.mode.startswith("I") or image.mode == "F":
        key = transparent if isinstance(transparent, int) else None
        image, alpha = _scaled(image, *_levels(image, exact), key)
        image = image.point(lambda value: 255 - value) if negative else image
    elif image.mode in ("P", "PA") or image.mode in ("RGBa", "La"):
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    elif transparent is not None and image.mode in ("1", "L", "RGB"):
        image, alpha = _keyed(image.convert("L") if image.mode == "1" else image, transparent)
    elif image.mode == "1":
        image = image.convert("L")
    if image.mode in ("LA", "RGBA"):
        alpha = image.getchannel("A")
        image = image.convert(image.mode[:-1])
    elif image.mode not in ("L", "RGB", "CMYK", "LAB", "YCbCr", "HSV"):
        image = image.convert("RGB")
    if alpha is not None and alpha.getextrema()[0] == 255:
        alpha = None
    return image, alpha


def on_white(image: Image, alpha: Image | None) -> Image:
    """An RGB picture over white."""
    from PIL import Image

    if alpha is None:
        return image
    ground = Image.new("RGB", image.size, "white")
    ground.paste(image, mask=alpha)
    return ground


def _strips(image: Image) -> Iterator[np.ndarray]:
    """Rows of a picture, some at a time, for floating-point copies of all of it would be large."""
    for top in range(0, image.height, ROWS):
        part = np.asarray(image.crop((0, top, image.width, min(top + ROWS, image.height))))
        if image.mode == "I" and _unsigned(image):
            part = part.view(np.uint32)
        yield part


def _unsigned(image: Any) -> bool:
    """Whether 32-bit samples are unsigned, as TIFF's tags of format (339) and bits (258) say; Pillow has no mode for it."""
    tags = getattr(image, "tag_v2", {})
    formats, bits = tags.get(339, (0,)), tags.get(258, (0,))
    return (formats[0] if isinstance(formats, tuple) else formats) == 1 and (
        bits[0] if isinstance(bits, tuple) else bits
    ) == 32


def _levels(image: Image, exact: bool) -> tuple[float, float]:
    """The samples that mean black and white."""
    lows, highs, whole = [], [], True
    for part in _strips(image):
        if not np.isfinite(part).all():
            raise NotFinite("holds NaN or infinite numbers")
        lows.append(float(part.min()))
        highs.append(float(part.max()))
        whole = whole and (image.mode != "F" or bool((part == np.floor(part)).all()))
    low, high = min(lows), max(highs)
    if low < 0:
        return low, high
    if image.mode == "F" and (high <= 1 or not whole):
        return 0.0, max(1.0, high)
    if high > 65535 or image.mode == "F" or (image.mode == "I" and not exact):
        return 0.0, _range(high)
    return 0.0, 65535.0 if exact or high >= 4096 else _range(high)


def _range(high: float) -> float:
    """The largest number of the fewest bits that hold a sample."""
    return next((2.0**bits - 1 for bits in _DEPTHS if high < 2**bits), max(high, 1.0))


def _scaled(image: Image, low: float, high: float, key: int | None) -> tuple[Image, Image | None]:
    from PIL import Image

    gray = np.empty((image.height, image.width), np.uint8)
    mask = np.empty_like(gray) if key is not None else None
    top = 0
    for part in _strips(image):
        rows = slice(top, top + len(part))
        # In halves, for the range itself may overflow.
        span = max(high / 2 - low / 2, np.finfo(np.float64).tiny)
        gray[rows] = np.rint((part.astype(np.float64) / 2 - low / 2) / span * 255).clip(0, 255)
        if mask is not None:
            mask[rows] = np.where(part == key, 0, 255)
        top += len(part)
    return Image.fromarray(gray), Image.fromarray(mask) if mask is not None else None


def _of_two_bytes(high: Image, low: Image, exact: bool, key: Any) -> tuple[Image, Image | None]:
    """A picture of several channels by the high and the low bytes of its samples, and its alpha."""
    from PIL import Image

    mode = "RGB" if high.mode == "RGBA" else high.mode
    count, shape = len(Image.new(mode, (1, 1)).getbands()), (high.height, high.width)
    first = np.asarray(high), np.asarray(low)

    def strips() -> Iterator[tuple[slice, np.ndarray]]:
        for top in range(0, high.height, ROWS):
            rows = slice(top, top + ROWS)
            yield rows, first[0][rows].astype(np.uint16) << 8 | first[1][rows]

    top, top_alpha = (
        max(int(part[..., where].max(initial=0)) for _, part in strips())
        for where in (slice(count), slice(count, None))
    )
    white = 65535.0 if exact or top >= 4096 else _range(top)
    opaque = 65535.0 if top_alpha >= 4096 else white
    colors, alpha = np.empty((*shape, count), np.uint8), np.full(shape, 255, np.uint8)
    for rows, part in strips():
        colors[rows] = np.rint(part[..., :count] / white * 255)
        if part.shape[-1] > count:
            alpha[rows] = np.rint(part[..., count] / opaque * 255).clip(0, 255)
        elif isinstance(key, tuple):
            alpha[rows] = np.where((part == key).all(-1), 0, 255)
    return Image.frombytes(mode, high.size, colors.tobytes()), Image.fromarray(alpha)


def _keyed(image: Image, transparent: Any) -> tuple[Image, Image | None]:
    """A picture one of whose samples means transparent."""
    if image.mode == "L" and isinstance(transparent, int):
        return image, image.point([0 if value == transparent else 255 for value in range(256)])
    if image.mode == "RGB" and isinstance(transparent, tuple) and len(transparent) == 3:
        image.info["transparency"] = transparent
        keyed = image.convert("RGBA")
        return keyed.convert("RGB"), keyed.getchannel("A")
    return image, None
