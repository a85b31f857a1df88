"""What a file is, judged by its first bytes, and the endings that names of pictures have."""

from __future__ import annotations

import struct
from importlib.util import find_spec

HEAD = 4096
"""Bytes of a file's beginning that are looked at."""

EXTRA = "pip install 'liftkit[pictures]'"

FORMATS = (
    *("PNG", "JPEG", "MPO", "WEBP", "AVIF", "HEIF", "JXL", "TIFF", "GIF", "BMP", "DIB", "JPEG2000", "ICO", "ICNS"),
    *("PPM", "PSD", "QOI", "DDS", "PCX", "SGI", "SUN", "TGA", "XBM", "XPM"),
)
"""Pillow's names of the formats that are read. Others are documents, need another program, or run one (EPS)."""


def _endings(text: str) -> frozenset[str]:
    return frozenset(text.split())


ENDINGS = _endings(
    ".png .apng .jpg .jpeg .jpe .jfif .mpo .webp .avif .avifs .heic .heics .heif .heifs .hif .jxl "
    ".tif .tiff .gif .bmp .dib .jp2 .j2k .j2c .jpx .jpc .jpf .ico .icns .pbm .pgm .ppm .pnm .pfm .psd "
    ".qoi .dds .pcx .sgi .rgb .rgba .bw .ras .tga .icb .vda .vst .xbm .xpm"
)
"""Endings of pictures, in small letters."""

_RAW = ".dng .cr2 .cr3 .crw .nef .nrw .arw .srf .sr2 .raf .orf .rw2 .rwl .pef .srw .x3f .mrw .dcr .kdc .erf .3fr .iiq .mef .mos"
_OTHERS = {
    "camera raw: develop it to JPEG or TIFF": _RAW,
    "a drawing or document: export it as PNG": ".svg .svgz .pdf .eps .ps .ai .wmf .emf",
    "a format that is not read: export it as PNG or TIFF": ".exr .hdr .xcf .kra .psb .clip .sai .bpg .flif .fits .jxr .wdp",
    "a video": ".mp4 .mov .m4v .avi .mkv .webm .mpg .mpeg",
    "an archive: unpack it": ".zip .tar .gz .tgz .7z .rar .bz2 .xz .zst",
    "unfinished or set aside": ".part .partial .crdownload .download .tmp .temp .bak .old .orig .aria2 .thm",
}
NOT_READ = {ending: reason for reason, endings in _OTHERS.items() for ending in _endings(endings)}
"""Endings of what people take for pictures and liftkit does not read, with the reason."""

TEXTS = _endings(
    ".txt .caption .json .jsonl .csv .tsv .md .yaml .yml .toml .html .xml .log .py .ini .cfg .parquet "
    ".arrow .safetensors .npy .npz .pt .bin .pkl .db .url .lnk .xmp .aae"
)
"""Endings of files that are never looked into for a picture."""

_HEIF_BRANDS = {b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"hevm", b"hevs", b"mif1", b"msf1", b"mif2"}
_MAGIC = (
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"GIF8", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG2000"),
    (b"\xff\x4f\xff\x51", "JPEG2000"),
    (b"\0\0\0\x0cJXL \r\n\x87\n", "JXL"),
    (b"\xff\x0a", "JXL"),
    (b"8BPS", "PSD"),
    (b"qoif", "QOI"),
    (b"DDS ", "DDS"),
    (b"icns", "ICNS"),
)
_FOREIGN = (
    (b"version https://git-lfs", "a git-lfs pointer: run 'git lfs pull'"),
    (b"%PDF", "a drawing or document: export it as PNG"),
    (b"%!PS", "a drawing or document: export it as PNG"),
    (b"PK\x03\x04", "an archive: unpack it"),
    (b"\x1f\x8b", "an archive: unpack it"),
    (b"\x1aE\xdf\xa3", "a video"),
    (b"FUJIFILMCCD-RAW", "camera raw: develop it to JPEG or TIFF"),
    (b"IIRO", "camera raw: develop it to JPEG or TIFF"),
    (b"IIRS", "camera raw: develop it to JPEG or TIFF"),
    (b"IIU\0", "camera raw: develop it to JPEG or TIFF"),
    (b"FOVb", "camera raw: develop it to JPEG or TIFF"),
    (b"\0\x05\x16\x07", "not a picture: notes that macOS keeps of a file"),
)


def format_of(head: bytes) -> str | None:
    """Pillow's name of a picture's format by the file's first bytes, where these tell it without doubt.

    Args:
        head: the first :data:`HEAD` bytes, or all.
    """
    if head[4:8] == b"ftyp":
        brands = _brands(head)
        if brands & {b"avif", b"avis"}:
            return "AVIF"
        return "HEIF" if brands & _HEIF_BRANDS else None
    if head.startswith(b"RIFF"):
        return "WEBP" if head[8:12] == b"WEBP" else None
    if head.startswith(b"BM") and (len(head) < 18 or head[14] not in (12, 16, 40, 52, 56, 64, 108, 124)):
        return None
    return next((name for magic, name in _MAGIC if head.startswith(magic)), None)


def refusal(head: bytes) -> str | None:
    """Why a file cannot be a picture that is read here, by its first bytes; None where it may be one."""
    if not head:
        return "an empty file"
    found = next((reason for magic, reason in _FOREIGN if head.startswith(magic)), None)
    if found:
        return found
    if head[4:8] == b"ftyp" and format_of(head) is None:
        return "camera raw: develop it to JPEG or TIFF" if b"crx " in _brands(head) else "a video"
    if head[:4] in (b"II*\0", b"MM\0*") and head[8:10] == b"CR":
        return "camera raw: develop it to JPEG or TIFF"
    if format_of(head) is None:
        return _text(head)
    missing = {"HEIF": ("HEIC", "pillow_heif"), "JXL": ("JPEG XL", "pillow_jxl")}.get(format_of(head) or "")
    if missing and find_spec(missing[1]) is None:
        return f"{missing[0]}: {EXTRA}"
    if format_of(head) == "AVIF" and not _avif_in_pillow() and find_spec("pillow_avif") is None:
        return "AVIF: pip install pillow-avif-plugin"
    return None


def register(name: str | None) -> None:
    """Make Pillow read a format that another package brings."""
    if name == "HEIF":
        from pillow_heif import register_heif_opener

        register_heif_opener()
    elif name == "JXL":
        import pillow_jxl  # noqa: F401
    elif name == "AVIF" and not _avif_in_pillow():
        import pillow_avif  # noqa: F401


def declared_size(head: bytes) -> tuple[int, int] | None:
    """Width and height by the first bytes, of formats whose decoders take memory for the picture as soon as it is opened."""
    try:
        if head.startswith(b"RIFF"):
            return _webp_size(head)
        if format_of(head) == "JXL":
            return _jxl_size(head)
    except (IndexError, struct.error):
        pass
    return None


def _avif_in_pillow() -> bool:
    from PIL import features

    return bool(features.check("avif"))


def _brands(head: bytes) -> set[bytes]:
    """The brands of a file type box: the major one and those that it is compatible with."""
    size = min(struct.unpack(">I", head[:4])[0], len(head))
    return {head[8:12], *(head[at : at + 4] for at in range(16, size, 4))}


def _text(head: bytes) -> str | None:
    """What a text in the place of a picture is."""
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<body")) or b"<html" in start[:1024]:
        return "HTML, not a picture"
    if b"<svg" in start[:1024]:
        return "a drawing or document: export it as PNG"
    if start.startswith((b"<?xml", b"<error", b"{", b"[")) or _prints(head):
        # PPM, XBM and XPM pictures begin as text does.
        return None if head[:1] in b"P#/" else "text, not a picture"
    return None


def _prints(head: bytes) -> bool:
    return not any(byte < 32 and byte not in b"\t\r\n\f\x1b" for byte in head)


def _webp_size(head: bytes) -> tuple[int, int] | None:
    kind = head[12:16]
    if kind == b"VP8X":
        return 1 + int.from_bytes(head[24:27], "little"), 1 + int.from_bytes(head[27:30], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 ":
        width, height = struct.unpack("<HH", head[26:30])
        return width & 0x3FFF, height & 0x3FFF
    return None


def _jxl_size(head: bytes) -> tuple[int, int] | None:
    """Of the size header of a codestream, bare or in its box (ISO/IEC 18181-1, D.2)."""
    at = 0
    if not head.startswith(b"\xff\x0a"):
        while head[at + 4 : at + 8] not in (b"jxlc", b"jxlp"):
            step = struct.unpack(">I", head[at : at + 4])[0]
            if step < 8:
                return None
            at += step
        at += 8 if head[at + 4 : at + 8] == b"jxlc" else 12
    bits = int.from_bytes(head[at + 2 : at + 18], "little")

    def take(count: int) -> int:
        nonlocal bits
        value, bits = bits & ((1 << count) - 1), bits >> count
        return value

    eights = take(1)

    def side() -> int:
        return 8 * (1 + take(5)) if eights else 1 + take((9, 13, 18, 30)[take(2)])

    height = side()
    ratio = take(3)
    if ratio == 0:
        return side(), height
    across, down = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))[ratio - 1]
    return height * across // down, height
