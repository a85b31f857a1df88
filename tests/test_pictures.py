"""The reader of pictures: colors, depths, alpha, formats, limits, and reasons for what cannot be read."""

from __future__ import annotations

import io
import struct
import sys
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from liftkit.data import picture_kinds, pictures
from liftkit.data.picture_errors import PictureError
from liftkit.data.picture_files import HIDDEN, scan
from liftkit.data.pictures import look, open_picture_file, read_picture
from tests.pictures import ADOBE, COLORS, P3, RAMP, chunk, encoded, read, reason


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
