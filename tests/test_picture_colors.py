"""Pictures of all color spaces, depths and kinds of opacity, as sRGB."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from liftkit.data.picture_color import HDR, NO_PROFILE, UNUSABLE
from liftkit.data.picture_depth import eight_bits, on_white
from liftkit.data.pictures import look
from tests.pictures import ADOBE, COLORS, P3, RAMP, chunk, encoded, read, reason


def png(rows: np.ndarray, depth: int, color: int, *extra: bytes) -> bytes:
    """A PNG by hand: rows of bytes as they are stored."""
    head = struct.pack(">IIBBBBB", 64, len(rows), depth, color, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + b"".join(extra) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def with_chunk(content: bytes, *extra: bytes) -> bytes:
    return content[:33] + b"".join(extra) + content[33:]


def in_srgb(image: Image.Image, profile: bytes) -> np.ndarray:
    """What littleCMS makes of a picture."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    return np.asarray(ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB"))


@pytest.mark.parametrize("profile", [ADOBE, P3])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "AVIF"])
def test_embedded_profiles(profile: bytes, kind: str) -> None:
    options = {"PNG": {}, "TIFF": {}, "WEBP": {"lossless": True}, "AVIF": {"quality": 100, "subsampling": "4:4:4"}}
    found = read(encoded(COLORS, kind, icc_profile=profile, **options[kind])).astype(int)
    error = np.abs(found - in_srgb(Image.fromarray(COLORS), profile))
    assert error.mean() < 2 if kind == "AVIF" else not error.any()
    assert np.abs(found - COLORS).max() > 20


def test_a_profile_of_srgb_changes_nothing() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.array_equal(read(encoded(COLORS, icc_profile=profile)), COLORS)


def test_the_reference_of_adobe_rgb() -> None:
    """The known pair: Adobe RGB (186, 60, 90) is sRGB (215, 57, 91)."""
    flat = np.full((8, 8, 3), (186, 60, 90), np.uint8)
    assert np.abs(read(encoded(flat, icc_profile=ADOBE))[0, 0].astype(int) - (215, 57, 91)).max() <= 1


def test_profiles_go_with_alpha_palettes_and_gray() -> None:
    straight = read(encoded(COLORS, icc_profile=ADOBE))
    alpha = np.dstack([COLORS, np.full((64, 64), 255, np.uint8)])
    alpha[:8, :, 3] = 0
    found = read(encoded(alpha, icc_profile=ADOBE))
    assert (found[:8] == 255).all()
    assert np.array_equal(found[8:], straight[8:])
    flat = Image.new("RGB", (64, 64), (186, 60, 90))
    assert np.array_equal(
        read(encoded(flat.quantize(4), icc_profile=ADOBE)),
        read(encoded(flat.quantize(4).convert("RGB"), icc_profile=ADOBE)),
    )
    gray = read(encoded(RAMP, icc_profile=gray_profile(1.0)))
    assert 180 < gray[0, 32, 0] < 192  # linear 128 is 188 in sRGB


def gray_profile(gamma: float) -> bytes:
    tags = {
        b"desc": b"desc" + bytes(4) + struct.pack(">I", 5) + b"gray\0" + bytes(78),
        b"wtpt": b"XYZ " + bytes(4) + struct.pack(">3i", 63190, 65536, 54061),
        b"kTRC": b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0",
        b"cprt": b"text" + bytes(4) + b"none\0",
    }
    table, data, start = b"", b"", 132 + 12 * len(tags)
    for name, value in tags.items():
        table += name + struct.pack(">II", start + len(data), len(value))
        data += value + bytes(-len(value) % 4)
    body = struct.pack(">I", len(tags)) + table + data
    head = (
        struct.pack(">I", 128 + len(body))
        + bytes(4)
        + struct.pack(">I", 0x02400000)
        + b"mntrGRAYXYZ "
        + bytes(12)
        + b"acsp"
    )
    return (head + bytes(28) + struct.pack(">3i", 63190, 65536, 54061)).ljust(128, b"\0") + body


@pytest.mark.parametrize("profile", [b"no profile at all", ADOBE[:200], gray_profile(2.2)])
def test_a_profile_that_cannot_be_used_is_noted_and_taken_for_srgb(profile: bytes) -> None:
    content = encoded(COLORS, icc_profile=profile)
    assert np.array_equal(read(content), COLORS)
    assert look(io.BytesIO(content), "x").remark == UNUSABLE


def test_png_says_its_colors_by_chunks() -> None:
    content = encoded(COLORS)
    p3 = in_srgb(Image.fromarray(COLORS), P3)
    assert np.abs(read(with_chunk(content, chunk(b"cICP", bytes([12, 13, 0, 1])))).astype(int) - p3).max() <= 1
    assert np.array_equal(read(with_chunk(content, chunk(b"cICP", bytes([1, 13, 0, 1])))), COLORS)
    hdr = with_chunk(content, chunk(b"cICP", bytes([9, 16, 0, 1])))
    assert look(io.BytesIO(hdr), "x").remark == HDR
    usual = chunk(b"gAMA", struct.pack(">I", 45455))
    assert np.array_equal(read(with_chunk(content, usual)), COLORS)
    linear = read(with_chunk(encoded(np.full((8, 8, 3), 128, np.uint8)), chunk(b"gAMA", struct.pack(">I", 100000))))
    assert abs(int(linear[0, 0, 0]) - 188) <= 1
    corners = (31270, 32900, 64000, 33000, 21000, 71000, 15000, 6000)
    adobe = with_chunk(content, chunk(b"gAMA", struct.pack(">I", 45475)), chunk(b"cHRM", struct.pack(">8I", *corners)))
    assert np.abs(read(adobe).astype(int) - in_srgb(Image.fromarray(COLORS), ADOBE)).max() <= 2
    assert np.array_equal(
        read(with_chunk(content, chunk(b"sRGB", b"\0"), chunk(b"gAMA", struct.pack(">I", 100000)))), COLORS
    )


def test_cmyk_is_read_and_noted() -> None:
    content = encoded(Image.new("CMYK", (64, 64), (0, 255, 255, 0)), "JPEG", quality=95)
    found = read(content)[32, 32]
    assert found[0] > 200 > 60 > found[2]
    assert look(io.BytesIO(content), "x").remark == NO_PROFILE


def test_exif_says_adobe_rgb_without_a_profile() -> None:
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0xA005] = {1: "R03"}
    found = read(encoded(np.full((64, 64, 3), (186, 60, 90), np.uint8), "JPEG", quality=100, subsampling=0, exif=exif))
    assert np.abs(found[32, 32].astype(int) - (215, 57, 91)).max() <= 4


@pytest.mark.parametrize(
    ("array", "kind"),
    [
        (RAMP.astype(np.float32) / 255, "TIFF"),
        (RAMP.astype(np.float32), "TIFF"),
        (RAMP.astype(np.int32), "TIFF"),
        (RAMP.astype(np.int32) * 257, "TIFF"),
        (RAMP.astype(np.int32) * (2**23), "TIFF"),
        (RAMP.astype(np.uint16) * 257, "TIFF"),
        (RAMP.astype(np.uint16) * 16, "TIFF"),
        (RAMP.astype(np.uint16), "TIFF"),
        (RAMP.astype(np.uint16) * 257, "PNG"),
        (RAMP.astype(np.uint16) * 257, "JPEG2000"),
    ],
)
def test_every_depth_shows_what_it_shows(array: np.ndarray, kind: str) -> None:
    options = {"irreversible": False} if kind == "JPEG2000" else {}
    found = read(encoded(array, kind, **options))[..., 0].astype(int)
    # A ramp to 252 in a type of 8 to 32 bits.
    assert np.abs(found - RAMP).max() <= 4
    assert found.std() > 60


def tiff16(array: np.ndarray, order: str = "<", packed: bool = False, photometric: int = 2) -> bytes:
    """A TIFF of several channels of 16 bits, which Pillow does not write."""
    height, width, count = array.shape
    body = array.astype(f"{order}u2").tobytes()
    body = zlib.compress(body) if packed else body
    tags = [
        (256, 4, width), (257, 4, height), (258, 3, [16] * count), (259, 3, 8 if packed else 1), (262, 3, photometric),
        (273, 4, 8), (277, 3, count), (278, 4, height), (279, 4, len(body)),
    ]  # fmt: skip
    if count == 4 and photometric == 2:
        tags.append((338, 3, 2))
    body += bytes(len(body) % 2)
    entries, more, at = b"", b"", 8 + len(body)
    beyond = at + 2 + 12 * len(tags) + 4
    for tag, kind, value in tags:
        letter = {3: "H", 4: "I"}[kind]
        values = value if isinstance(value, list) else [value]
        raw = struct.pack(f"{order}{len(values)}{letter}", *values)
        if len(raw) > 4:
            field = struct.pack(f"{order}I", beyond + len(more))
            more += raw
        else:
            field = raw.ljust(4, b"\0")
        entries += struct.pack(f"{order}HHI", tag, kind, len(values)) + field
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, at)
    return head + body + struct.pack(f"{order}H", len(tags)) + entries + bytes(4) + more


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("bits", [8, 12, 16])
def test_colors_of_two_bytes_are_scaled_by_their_range(bits: int, packed: bool, order: str) -> None:
    whole = (2**bits - 1) / 255
    deep = (
        np.stack([RAMP * whole, RAMP[:, ::-1] * whole, np.full_like(RAMP, 255) * whole], -1).round().astype(np.uint16)
    )
    expected = np.stack([RAMP, RAMP[:, ::-1], np.full_like(RAMP, 255)], -1)
    assert np.array_equal(read(tiff16(deep, order, packed)), expected)
    opaque = np.concatenate([deep, np.full((*deep.shape[:2], 1), 65535, np.uint16)], -1)
    assert np.array_equal(read(tiff16(opaque, order, packed)), expected)


def test_colors_of_two_bytes_in_png() -> None:
    deep = np.stack([RAMP, RAMP[:, ::-1], RAMP], -1).astype(np.uint16) * 257
    # To the nearest of 255 levels; the high byte alone would be one level under it.
    found = read(png((deep - np.minimum(deep, 100)).astype(">u2").reshape(64, -1).view(np.uint8), 16, 2))
    assert np.array_equal(found, deep // 257)
    dark = (deep // 257).astype(">u2")
    assert read(png(dark.reshape(64, -1).view(np.uint8), 16, 2)).max() == 1  # PNG's white is 65535
    half = np.concatenate([deep, np.full((64, 64, 1), 32768, np.uint16)], -1).astype(">u2")
    assert (
        np.abs(read(png(half.reshape(64, -1).view(np.uint8), 16, 6)).astype(int) - (deep // 257 + 255) / 2).max() <= 1
    )


def test_gray_of_two_bytes_with_opacity_in_png() -> None:
    gray = RAMP.astype(np.uint16) * 257
    rounded_up = gray - np.minimum(gray, 100)
    opaque = np.stack([rounded_up, np.full_like(gray, 65535)], -1).astype(">u2")
    assert np.array_equal(read(png(opaque.reshape(64, -1).view(np.uint8), 16, 4))[..., 1], RAMP)
    half = np.stack([gray, np.full_like(gray, 32768)], -1).astype(">u2")
    found = read(png(half.reshape(64, -1).view(np.uint8), 16, 4)).astype(int)
    assert np.abs(found - (RAMP[..., None].astype(int) + 255) / 2).max() <= 1


def test_numbers_below_zero_and_above_one_are_scaled_by_their_range() -> None:
    found = read(encoded(RAMP.astype(np.float32) / 50 - 2.5, "TIFF"))[0, :, 0]
    assert (found[0], found[-1]) == (0, 255)
    found = read(encoded(RAMP.astype(np.float32) / 200, "TIFF"))[0, :, 0]
    assert (found[0], found[-1]) == (0, 255)
    found = read(encoded(RAMP.astype(np.int32) - 100, "TIFF"))[0, :, 0]
    assert (found[0], found[-1]) == (0, 255)
    array = RAMP.astype(np.float32)
    array[3, 3] = np.nan
    assert reason(encoded(array, "TIFF")) == "holds NaN or infinite numbers"
    assert (read(encoded(np.zeros((8, 8), np.float32), "TIFF")) == 0).all()


def test_samples_that_mean_transparent() -> None:
    rows = (RAMP.astype(">u2") * 257).view(np.uint8)
    found = read(png(rows, 16, 0, chunk(b"tRNS", struct.pack(">H", 40 * 257))))[0, :, 0]
    assert found[10] == 255
    assert np.array_equal(np.delete(found, 10), np.delete(RAMP[0], 10))
    packed = np.tile(np.array([0x1B], np.uint8), (64, 16))  # samples 0, 1, 2, 3 of two bits
    found = read(png(packed, 2, 0, chunk(b"tRNS", struct.pack(">H", 1))))[0, :4, 0]
    assert found.tolist() == [0, 255, 170, 255]
    deep = np.zeros((64, 64, 3), ">u2")
    deep[:, :32] = (0x1234, 0x5678, 0x9ABC)
    found = read(
        png(deep.reshape(64, -1).view(np.uint8), 16, 2, chunk(b"tRNS", struct.pack(">3H", 0x1234, 0x5678, 0x9ABC)))
    )
    assert (found[:, :32] == 255).all()
    assert (found[:, 32:] == 0).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "RGBa", "La"])
def test_alpha_is_over_white_in_every_mode(mode: str) -> None:
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 128))
    if mode == "PA":
        image = Image.new("P", (8, 8))
        image.putalpha(128)
    else:
        image = image.convert("LA").convert(mode) if mode in ("LA", "La") else image.convert(mode)
    assert image.mode == mode
    color, alpha = eight_bits(image)
    assert np.abs(np.asarray(on_white(color.convert("RGB"), alpha)).astype(int) - 127).max() <= 1


@pytest.mark.parametrize("samples", [RAMP, RAMP.astype(np.uint16) * 257, RAMP / np.float32(255)])
def test_zero_is_white_where_a_tiff_says_so(samples: np.ndarray) -> None:
    content = encoded(Image.fromarray(samples), "TIFF")
    black = struct.pack("<HHIHH", 262, 3, 1, 1, 0)
    assert black in content
    content = content.replace(black, struct.pack("<HHIHH", 262, 3, 1, 0, 0))
    assert np.abs(read(content)[..., 0].astype(int) - (255 - RAMP)).max() <= 1
