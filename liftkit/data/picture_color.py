"""From the colors that a picture's file declares to sRGB: embedded profiles, PNG's color chunks, Exif's Adobe RGB."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from functools import lru_cache
from io import BytesIO
from typing import IO, TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

UNUSABLE = "with a color profile that cannot be used, taken for sRGB"
HDR = "of high dynamic range (PQ or HLG), whose brightness is taken for that of sRGB"
NO_PROFILE = "in CMYK without a profile, whose colors are approximate"

D65 = (0.3127, 0.3290)
_SRGB = ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06))
_ADOBE = ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06))
_P3 = ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060))
_BT2020 = ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046))
# Code points of ITU-T H.273: primaries with their white, and exponents of transfer functions; None is sRGB's own.
_PRIMARIES = {1: (_SRGB, D65), 9: (_BT2020, D65), 11: (_P3, (0.314, 0.351)), 12: (_P3, D65)}
_TRANSFERS = {1: None, 2: None, 4: 2.2, 5: 2.8, 6: None, 8: 1.0, 13: None, 14: None, 15: None}
_HDR_TRANSFERS = (16, 18)
_D50 = np.array([0.9642, 1.0, 0.8249])
_BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
_GAMMA_OF_SRGB = 0.45455
_MOST_CHUNKS, _MOST_CHUNK_BYTES = 100_000, 1 << 20


def declared_profile(opened: Image, file: IO[bytes]) -> tuple[bytes | None, str]:
    """The ICC profile of an opened picture, made where its colors are declared in another way.

    Args:
        opened: by Pillow, not decoded yet.
        file: its file, whose place is changed.

    Returns:
        The profile, None for sRGB; and a remark for people where the colors are not quite known, else an empty string.
    """
    try:
        points = _code_points(opened, file)
        if points is not None and points[0] != 2:
            return _by_code_points(*points)
        profile = opened.info.get("icc_profile")
        if profile:
            # Tried now, so that the remark does not wait for the picture to be decoded.
            return (profile, "") if _fits(profile, opened.mode) else (None, UNUSABLE)
        if opened.format == "PNG" and "srgb" not in opened.info:
            return _by_gamma(opened), ""
        if opened.format in ("JPEG", "MPO", "TIFF") and _is_adobe_rgb(opened):
            return matrix_profile(_ADOBE, D65, 563 / 256), ""
    except _errors():
        return None, UNUSABLE
    return None, NO_PROFILE if opened.mode == "CMYK" else ""


def to_srgb(image: Image, profile: bytes | None) -> Image:
    """A picture without alpha, of eight bits a channel, in sRGB. Its own memory may be written over.

    Args:
        image: in L, RGB, CMYK, LAB, YCbCr or HSV.
        profile: from :func:`declared_profile`.
    """
    from PIL import ImageCms

    if image.mode == "LAB":
        return _applied(image, _transform(None, "LAB"))
    if profile is None:
        return image if image.mode == "RGB" else image.convert("RGB")
    if image.mode not in ("RGB", "CMYK") and not (image.mode == "L" and _space(profile) == "GRAY"):
        image = image.convert("RGB")
    try:
        transform = _transform(profile, image.mode)
    except _errors():
        transform = None
    if transform is None:
        return image.convert("RGB")
    if image.mode == "RGB":
        ImageCms.applyTransform(image, transform, inPlace=True)
        return image
    return _applied(image, transform)


def matrix_profile(primaries: Sequence[Sequence[float]], white: Sequence[float], gamma: float | None) -> bytes:
    """An ICC profile (version 2.4 with a parametric curve) of an RGB space.

    Args:
        primaries: chromaticities x, y of red, green and blue.
        white: that of white.
        gamma: the exponent from stored values to light; None for sRGB's curve.

    Raises:
        ValueError: if no color space has these.
    """
    corners = np.array([[x / y, 1.0, (1 - x - y) / y] for x, y in primaries]).T
    light = np.array([white[0] / white[1], 1.0, (1 - white[0] - white[1]) / white[1]])
    matrix = corners * np.linalg.solve(corners, light)
    cones = (_BRADFORD @ _D50) / (_BRADFORD @ light)
    matrix = np.linalg.inv(_BRADFORD) @ np.diag(cones) @ _BRADFORD @ matrix
    if not np.isfinite(matrix).all() or np.abs(matrix).max() > 100 or (gamma is not None and not 0.1 <= gamma <= 10):
        raise ValueError("no color space")
    curve = (3, (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)) if gamma is None else (0, (gamma,))
    trc = b"para" + bytes(4) + struct.pack(">HH", curve[0], 0) + _fixed(*curve[1])
    tags = {
        b"desc": b"desc" + bytes(4) + struct.pack(">I", 8) + b"liftkit\0" + bytes(78),
        b"cprt": b"text" + bytes(4) + b"none\0",
        b"wtpt": b"XYZ " + bytes(4) + _fixed(*_D50),
        **{f"{name}XYZ".encode(): b"XYZ " + bytes(4) + _fixed(*column) for name, column in zip("rgb", matrix.T)},
        **{f"{name}TRC".encode(): trc for name in "rgb"},
    }
    table, data, start = b"", b"", 132 + 12 * len(tags)
    for name, value in tags.items():
        table += name + struct.pack(">II", start + len(data), len(value))
        data += value + bytes(-len(value) % 4)
    body = struct.pack(">I", len(tags)) + table + data
    head = struct.pack(">I", 128 + len(body)) + bytes(4) + struct.pack(">I", 0x04300000) + b"mntrRGB XYZ "
    return (head + bytes(12) + b"acsp" + bytes(28) + _fixed(*_D50)).ljust(128, b"\0") + body


def _fixed(*values: float) -> bytes:
    return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))


def _errors() -> tuple[type[Exception], ...]:
    """What littleCMS and odd numbers raise."""
    from PIL import ImageCms

    return (
        ImageCms.PyCMSError,
        OSError,
        ValueError,
        TypeError,
        ArithmeticError,
        LookupError,
        struct.error,
        SyntaxError,
    )


@lru_cache(maxsize=32)
def _transform(profile: bytes | None, mode: str) -> Any:
    """littleCMS's from a profile (None: CIELAB) to sRGB; None where the profile is sRGB's, to within a level."""
    from PIL import Image, ImageCms

    source = ImageCms.createProfile("LAB") if profile is None else ImageCms.ImageCmsProfile(BytesIO(profile))
    transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    if mode == "RGB":
        steps = np.linspace(0, 255, 18).round().astype(np.uint8)
        grid = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(18, -1, 3)
        found = np.asarray(ImageCms.applyTransform(Image.fromarray(grid), transform))
        if np.abs(found.astype(int) - grid).max() <= 1:
            return None
    return transform


def _applied(image: Image, transform: Any) -> Image:
    from PIL import ImageCms

    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None
    return converted


@lru_cache(maxsize=32)
def _space(profile: bytes) -> str:
    from PIL import ImageCms

    return ImageCms.ImageCmsProfile(BytesIO(profile)).profile.xcolor_space.strip()


def _fits(profile: bytes, mode: str) -> bool:
    """Whether a profile is of the kind of colors that the picture has, and littleCMS can use it."""
    space = _space(profile)
    if mode in ("CMYK", "LAB"):
        wanted, working = mode.upper(), mode
    else:
        gray = mode in ("1", "L", "LA", "La", "F") or mode.startswith("I")
        wanted, working = ("GRAY", "L") if gray and space == "GRAY" else ("RGB", "RGB")
    if space.upper() != wanted:
        return False
    if working != "LAB":
        _transform(profile, working)
    return True


def _by_code_points(primaries: int, transfer: int) -> tuple[bytes | None, str]:
    """A profile of code points of ITU-T H.273."""
    if transfer not in _TRANSFERS or primaries not in _PRIMARIES:
        return None, HDR if transfer in _HDR_TRANSFERS else UNUSABLE
    if primaries == 1 and _TRANSFERS[transfer] is None:
        return None, ""
    return matrix_profile(*_PRIMARIES[primaries], _TRANSFERS[transfer]), ""


def _by_gamma(opened: Image) -> bytes | None:
    """A profile of PNG's gAMA and cHRM chunks; None where they are missing, or are those that go with sRGB."""
    gamma, corners = opened.info.get("gamma"), opened.info.get("chromaticity")
    white: Sequence[float] = D65
    primaries: Sequence[Sequence[float]] = _SRGB
    if corners is not None:
        pairs = [corners[at : at + 2] for at in range(0, 8, 2)]
        white, primaries = pairs[0], pairs[1:]
    usual = np.allclose([white, *primaries], [D65, *_SRGB], atol=0.002)
    if usual and (gamma is None or abs(gamma - _GAMMA_OF_SRGB) < 0.005):
        return None
    return matrix_profile(primaries, white, None if gamma is None else 1 / gamma)


def _is_adobe_rgb(opened: Any) -> bool:
    """Whether a camera that embeds no profile says so in Exif: the interoperability index R03 means Adobe RGB."""
    from PIL import ExifTags, Image

    try:
        return Image.Image.getexif(opened).get_ifd(ExifTags.IFD.Interop).get(1) == "R03"
    except KeyError:  # Pillow before 13, where there is no such table
        return False


def _code_points(opened: Image, file: IO[bytes]) -> tuple[int, int] | None:
    """Primaries and transfer of PNG's cICP chunk, which goes before any profile, or of a HEIF without one."""
    nclx = opened.info.get("nclx_profile")
    if isinstance(nclx, dict) and not opened.info.get("icc_profile"):
        return int(nclx["color_primaries"]), int(nclx["transfer_characteristics"])
    if opened.format != "PNG":
        return None
    body = next((body for _, body in png_chunks(file, (b"cICP",), b"IDAT")), b"")
    return (body[0], body[1]) if len(body) == 4 else None


def png_chunks(file: IO[bytes], kinds: Sequence[bytes], end: bytes = b"IEND") -> Iterator[tuple[bytes, bytes]]:
    """Chunks of some kinds in a PNG, with what they hold; others are passed over unread.

    Args:
        file: of the PNG; its place is changed.
        kinds: names of chunks.
        end: the chunk to stop at.
    """
    file.seek(8)
    for _ in range(_MOST_CHUNKS):
        head = file.read(8)
        if len(head) < 8 or head[4:] in (end, b"IEND"):
            return
        size = struct.unpack(">I", head[:4])[0]
        if head[4:] in kinds and size <= _MOST_CHUNK_BYTES:
            yield head[4:], file.read(size)
            file.seek(4, 1)
        else:
            file.seek(size + 4, 1)
