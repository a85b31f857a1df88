"""The reader of pictures: colors, depths, alpha, formats, limits, and reasons for what cannot be read."""

from __future__ import annotations

import io
import struct
import sys
import threading
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from liftkit.data import picture_kinds, pictures
from liftkit.data.picture_color import D65, HDR, NO_PROFILE, UNUSABLE, matrix_profile
from liftkit.data.picture_depth import eight_bits, on_white
from liftkit.data.picture_errors import PictureError
from liftkit.data.picture_files import HIDDEN, scan
from liftkit.data.pictures import look, open_picture_file, read_picture

ADOBE = matrix_profile([(0.64, 0.33), (0.21, 0.71), (0.15, 0.06)], D65, 563 / 256)
P3 = matrix_profile([(0.68, 0.32), (0.265, 0.69), (0.15, 0.06)], D65, None)
RAMP = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (64, 1))
COLORS = np.stack([60 + RAMP // 2, 60 + RAMP.T // 2, np.full_like(RAMP, 90)], -1)


def encoded(array: np.ndarray | Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def read(content: bytes, resolution: int = 64) -> np.ndarray:
    image = read_picture(io.BytesIO(content), "picture", resolution)
    assert image.mode == "RGB"
    return np.asarray(image)


def reason(content: bytes, name: str = "picture") -> str:
    with pytest.raises(PictureError) as caught:
        read_picture(io.BytesIO(content), name, 64)
    return caught.value.reason


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


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


# Colors


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


# Depth


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


def test_other_modes() -> None:
    assert read(encoded(Image.new("1", (8, 8), 1))).min() == 255
    lab = ImageCms.applyTransform(
        Image.fromarray(COLORS),
        ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB"),
    )
    assert lab is not None
    assert np.abs(read(encoded(lab, "TIFF")).astype(int) - COLORS).mean() < 2
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    for kind in ("GIF", "PNG", "WEBP"):
        found = read(encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=100))
        assert found[4, 4, 0] > 240 > 20 > found[4, 4, 2], kind


# Formats that other packages bring


def test_heic_avif_and_jpeg_xl_by_the_extra() -> None:
    heif, _ = pytest.importorskip("pillow_heif"), pytest.importorskip("pillow_jxl")
    heif.register_heif_opener()
    exif = Image.Exif()
    exif[0x0112] = 6
    wide = np.ascontiguousarray(COLORS[:32])
    for kind, options in (("HEIF", {"quality": 100}), ("JXL", {"lossless": True}), ("AVIF", {"quality": 100})):
        assert np.abs(read(encoded(COLORS, kind, **options)).astype(int) - COLORS).max() <= 12, kind
        turned = encoded(wide, kind, exif=exif.tobytes(), **options)
        found = look(io.BytesIO(turned), "x")
        assert read(turned).shape[:2] == (found.height, found.width), kind


@pytest.mark.parametrize(("package", "name"), [("pillow_heif", "HEIC"), ("pillow_jxl", "JPEG XL")])
def test_without_the_extra_they_are_named_with_what_to_install(
    package: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = picture_kinds.find_spec
    monkeypatch.setattr(picture_kinds, "find_spec", lambda asked: None if asked == package else real(asked))
    heads = {"HEIC": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(50), "JPEG XL": b"\xff\x0a" + bytes(50)}
    assert reason(heads[name]) == f"{name}: pip install 'liftkit[pictures]'"


def test_the_size_of_jpeg_xl_and_webp_is_known_before_they_are_decoded() -> None:
    pytest.importorskip("pillow_jxl")
    for width, height in ((64, 64), (300, 40), (33, 1000), (1600, 900)):
        for kind in ("JXL", "WEBP"):
            content = encoded(Image.new("RGB", (width, height), "red"), kind, lossless=True)
            assert picture_kinds.declared_size(content) == (width, height)
        assert picture_kinds.declared_size(encoded(Image.new("RGB", (width, height)), "WEBP")) == (width, height)


# What cannot be read


def test_reasons() -> None:
    whole = encoded(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    photo = encoded(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8), "JPEG")
    assert reason(whole[: len(whole) // 2]) == reason(photo[: len(photo) // 2]) == "truncated"
    assert reason(b"") == "an empty file"
    assert reason(b"\n <!DOCTYPE html><html>404") == "HTML, not a picture"
    assert reason(b"version https://git-lfs.github.com/spec/v1\noid") == "a git-lfs pointer: run 'git lfs pull'"
    assert reason(b"II*\0\x10\0\0\0CR\x02\0" + bytes(99)) == "camera raw: develop it to JPEG or TIFF"
    assert reason(b"\0\0\0\x18ftypcrx \0\0\0\0crx isom" + bytes(50)) == "camera raw: develop it to JPEG or TIFF"
    assert reason(b"\0\0\0\x18ftypmp42\0\0\0\0isommp42" + bytes(50)) == "a video"
    assert reason(bytes(range(7, 200))) == "not a picture of a known format"
    assert reason(b"%!PS-Adobe-3.0 EPSF-3.0\n") == "a drawing or document: export it as PNG", "no interpreter is run"
    assert reason(encoded(COLORS, "TIFF", tiffinfo={50706: b"\1\4\0\0"})) == "camera raw: develop it to JPEG or TIFF"


def test_a_kind_of_tiff_that_is_not_read_is_not_called_damaged_alone() -> None:
    floats = encoded(Image.fromarray(RAMP / np.float32(255)), "TIFF")
    doubles = floats.replace(struct.pack("<HHIHH", 258, 3, 1, 32, 0), struct.pack("<HHIHH", 258, 3, 1, 64, 0))
    assert doubles != floats
    assert "of a kind that is not read" in reason(doubles)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "late PNG", "WEBP", "TIFF"])
def test_the_header_has_the_size_of_the_upright_picture(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    wide = COLORS[:32]
    if kind == "TIFF":
        content = encoded(wide, kind, tiffinfo={274: orientation})
    elif kind == "late PNG":  # where exiftool puts it
        content = encoded(wide)
        content = content[:-12] + chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")) + content[-12:]
    else:
        content = encoded(wide, kind, exif=exif, lossless=True)
    turned = {
        1: wide, 2: wide[:, ::-1], 3: wide[::-1, ::-1], 4: wide[::-1], 5: wide.transpose(1, 0, 2), 6: np.rot90(wide, -1),
        7: np.rot90(wide, 2).transpose(1, 0, 2), 8: np.rot90(wide),
    }[orientation]  # fmt: skip
    assert np.array_equal(read(content), turned)
    found = look(io.BytesIO(content), "picture")
    assert (found.height, found.width) == turned.shape[:2]


@pytest.mark.parametrize("samples", [RAMP, RAMP.astype(np.uint16) * 257, RAMP / np.float32(255)])
def test_zero_is_white_where_a_tiff_says_so(samples: np.ndarray) -> None:
    content = encoded(Image.fromarray(samples), "TIFF")
    black = struct.pack("<HHIHH", 262, 3, 1, 1, 0)
    assert black in content
    content = content.replace(black, struct.pack("<HHIHH", 262, 3, 1, 0, 0))
    assert np.abs(read(content)[..., 0].astype(int) - (255 - RAMP)).max() <= 1


def test_content_decides_and_not_the_name(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(encoded(COLORS))
    with open_picture_file(tmp_path / "a.jpg", "a.jpg") as file:
        assert np.array_equal(np.asarray(read_picture(file, "a.jpg", 64)), COLORS)


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    for name, why in (("pipe.png", "no regular file"), ("folder.png", "no regular file"), ("none.png", "gone")):
        with pytest.raises(PictureError, match=why), open_picture_file(tmp_path / name, name):
            pass


def test_too_large_is_a_reason_before_anything_is_decoded() -> None:
    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    limit = Image.MAX_IMAGE_PIXELS
    assert reason(bomb) == "too large"
    assert limit == Image.MAX_IMAGE_PIXELS
    canvas = b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + b"\xff\xff\xff" * 2
    assert reason(canvas) == "too large"


def test_a_large_jpeg_is_reduced_while_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "MOST_PIXELS", 200 * 200)
    photo = Image.new("RGB", (1024, 512), "red")
    assert read(encoded(photo, "JPEG"), 64).shape == (64, 128, 3)
    assert reason(encoded(photo, "PNG")) == "too large"
    assert reason(encoded(photo, "JPEG", progressive=True)) == "too large", "its coefficients are all in memory"


def test_pictures_in_flight_are_limited_by_pixels() -> None:
    in_flight = pictures._InFlight(100)
    most, now, lock = [0], [0], threading.Lock()

    def work(pixels: int) -> None:
        with in_flight.hold(pixels):
            with lock:
                now[0] += pixels
                most[0] = max(most[0], now[0])
            time.sleep(0.005)
            with lock:
                now[0] -= pixels

    threads = [threading.Thread(target=work, args=(pixels,)) for pixels in [30, 60, 90, 20, 300, 50] * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert now == [0]
    assert most == [300], "one that is larger than the limit is alone"


# Folders


def test_what_in_a_folder_is_a_picture(tmp_path: Path) -> None:
    for name in (
        *("a.png", "B.JPG", "sub/c.webp", "no-ending", "photo.jpg_large", "4f2a", ".hidden.png", "._a.png"),
        *("__MACOSX/a.png", "@eaDir/a.png/thumb.png", ".Trash-1000/d.png", "sub/.ipynb_checkpoints/c.png"),
        *("x.png.part", "raw.dng", "notes.txt", "film.mp4"),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(encoded(COLORS[:8, :8]))
    (tmp_path / "other").write_bytes(b"no picture")
    (tmp_path / "gone.png").symlink_to("nowhere.png")
    elsewhere = tmp_path.parent / f"{tmp_path.name}-elsewhere"
    elsewhere.mkdir()
    (elsewhere / "far.png").write_bytes(encoded(COLORS))
    (tmp_path / "link").symlink_to(elsewhere)
    (tmp_path / "sub" / "circle").symlink_to(tmp_path)
    found = scan(tmp_path)
    names = [path.relative_to(tmp_path).as_posix() for path in found.pictures]
    assert sorted(names) == ["4f2a", "B.JPG", "a.png", "link/far.png", "no-ending", "photo.jpg_large", "sub/c.webp"]
    left_out = {name: reason for reason, names in found.tally.left_out.items() for name in names}
    assert {name for name, why in left_out.items() if why == HIDDEN} == {
        *(".hidden.png", "._a.png", "__MACOSX/", "@eaDir/", ".Trash-1000/", "sub/.ipynb_checkpoints/"),
    }
    assert left_out["raw.dng"].startswith("camera raw")
    assert left_out["film.mp4"] == "a video"
    assert left_out["x.png.part"] == "unfinished or set aside"
    assert left_out["gone.png"] == "a link that leads nowhere"


# Hostile bytes

SEEDS = {
    "PNG": encoded(COLORS[:16, :16], icc_profile=ADOBE),
    "deep": encoded(RAMP[:16, :16].astype(np.uint16) * 257),
    "JPEG": encoded(COLORS[:16, :16], "JPEG", icc_profile=P3),
    "GIF": encoded(COLORS[:16, :16], "GIF"),
    "TIFF": encoded(RAMP[:16, :16].astype(np.float32), "TIFF"),
    "LZW": encoded(COLORS[:16, :16], "TIFF", compression="tiff_lzw"),
    "WEBP": encoded(COLORS[:16, :16], "WEBP"),
    "AVIF": encoded(COLORS[:16, :16], "AVIF"),
    "BMP": encoded(COLORS[:16, :16], "BMP"),
    "JPEG2000": encoded(COLORS[:16, :16], "JPEG2000"),
    "ICO": encoded(COLORS[:16, :16], "ICO"),
    "PPM": encoded(COLORS[:16, :16], "PPM"),
    "QOI": encoded(COLORS[:16, :16], "QOI") if sys.modules.get("PIL.QoiImagePlugin") else b"qoif" + bytes(30),
    "TGA": encoded(COLORS[:16, :16], "TGA"),
}


def harmless(content: bytes, name: str) -> None:
    """Read, or refused with a reason."""
    for work in (lambda file: look(file, name), lambda file: read_picture(file, name, 16)):
        try:
            work(io.BytesIO(content))
        except PictureError as error:
            assert error.reason
            assert "\n" not in str(error)


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    kind=st.sampled_from(sorted(SEEDS)),
    changes=st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), min_size=1, max_size=6),
    cut=st.floats(0.05, 1.0),
)
def test_changed_bytes_are_read_or_refused(kind: str, changes: list[tuple[int, int]], cut: float) -> None:
    content = bytearray(SEEDS[kind][: max(1, int(cut * len(SEEDS[kind])))])
    for place, value in changes:
        content[place % len(content)] = value
    harmless(bytes(content), f"picture.{kind.lower()}")


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    start=st.sampled_from([b"P6", b"\x89PNG\r\n\x1a\n", b"II*\0", b"RIFF0000WEBP", b"\xff\xd8\xff", b"\xff\x0a"]),
    rest=st.binary(max_size=300),
)
def test_any_bytes_are_read_or_refused(start: bytes, rest: bytes) -> None:
    harmless(start + rest, "picture.tga")
