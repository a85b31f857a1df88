"""Pictures of any depth in eight bits a channel, with their alpha apart."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

ROWS = 256
_DEPTHS = (8, 10, 12, 14, 16, 24, 31, 32)
_SAMPLES = {"1": 255, "L;1": 255, "L;2": 85, "L;4": 17}
"""By how much Pillow multiplies gray samples of few bits, and not the one that means transparent."""


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
    raw = opened.tile[0][3]
    raw = raw[0] if isinstance(raw, tuple) else raw
    if isinstance(value, int):
        return value * _SAMPLES.get(str(raw), 1)
    if isinstance(value, tuple) and str(raw).startswith("RGB;16"):
        return tuple(each >> 8 for each in value)
    return value


def white_is_zero(opened: Any) -> bool:
    """Whether a TIFF's zero means white, in a mode that Pillow does not turn round when it decodes.

    Args:
        opened: by Pillow, not decoded yet.
    """
    wide = opened.mode.startswith("I") or opened.mode == "F"
    return bool(opened.format == "TIFF" and wide and opened.tag_v2.get(262) == 0)


def eight_bits(
    image: Image, transparent: Any = None, exact: bool = False, negative: bool = False
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

    Returns:
        The picture in L, RGB, CMYK, LAB, YCbCr or HSV, and its alpha in L; None where nothing is transparent.

    Raises:
        NotFinite: if floating-point samples are NaN or infinite.
    """
    alpha = None
    if image.mode.startswith("I") or image.mode == "F":
        low, high = _levels(image, exact)
        key = transparent if isinstance(transparent, int) else None
        image, alpha = _scaled(image, low, high, key)
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


def _keyed(image: Image, transparent: Any) -> tuple[Image, Image | None]:
    """A picture one of whose samples means transparent."""
    if image.mode == "L" and isinstance(transparent, int):
        return image, image.point([0 if value == transparent else 255 for value in range(256)])
    if image.mode == "RGB" and isinstance(transparent, tuple) and len(transparent) == 3:
        image.info["transparency"] = transparent
        keyed = image.convert("RGBA")
        return keyed.convert("RGB"), keyed.getchannel("A")
    return image, None
