"""Sampled images on disk: one sheet, or a folder of single images with a sheet; each file says what made it.

The settings (prompt, seed, steps, size, guidance, model) are JSON in the picture's metadata: the PNG text chunk ``liftkit``,
or the EXIF description of a JPEG or WebP.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from liftkit.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
KEY = "liftkit"
"""The text chunk of a PNG that holds the settings."""
_DESCRIPTION = 0x010E
SHEET = "sheet.png"


def is_folder(output: Path | str) -> bool:
    """True where an output names a folder: an existing one, or a name that ends in a slash or has no ending."""
    return str(output).endswith(("/", os.sep)) or Path(output).is_dir() or not Path(output).suffix


@contextmanager
def held_output(output: Path | str) -> Iterator[None]:
    """Hold the output of :func:`save_images` while the images are made; what killed runs left of it goes.

    Raises:
        UsageError: see :func:`check_output`; or another run is making it.
    """
    from liftkit.checkpoint.files import output_file
    from liftkit.checkpoint.leftovers import sweep_inside
    from liftkit.checkpoint.lock import claim

    check_output(output)
    if not is_folder(output):
        with output_file(Path(output), *FORMATS):
            yield
        return
    with claim(Path(output), inside=True):
        sweep_inside(Path(output))
        yield


def check_output(output: Path | str) -> None:
    """Raise unless images can be written to an output, a picture file or a folder.

    Raises:
        UsageError: if the ending is unknown, the folder around it is missing or cannot be written to, or something else
            is in the way.
    """
    path = Path(output)
    if is_folder(output):
        if path.exists() and not path.is_dir():
            raise UsageError(f"{output}: is a file; the output is a folder of images")
        place = path if path.is_dir() else path.absolute().parent
    elif path.suffix.lower() not in FORMATS:
        raise UsageError(
            f"{output}: unknown picture format {path.suffix!r}; use {', '.join(sorted(FORMATS))}, or a folder"
        )
    else:
        place = path.absolute().parent
    if not place.is_dir():
        raise UsageError(f"{place}: no such folder; make it first")
    if not os.access(place, os.W_OK):
        raise UsageError(f"{place}: not writable; choose another output")


def save_images(
    images: Tensor, output: Path | str, settings: Sequence[dict[str, Any]], columns: int | None = None
) -> list[Path]:
    """Write images as one sheet, or into a folder as single images beside a sheet; each file appears at once.

    Args:
        images: (n, 3, H, W) in [-1, 1].
        output: see :func:`check_output`. In a folder no picture of an earlier run is replaced but the sheet.
        settings: what made each image, plain data with ``prompt`` and ``seed``.
        columns: of the sheet; by their number if left out.

    Returns:
        The files that were written, the sheet last.

    Raises:
        UsageError: see :func:`check_output`.
        LiftkitError: if the disk refuses.
    """
    from liftkit.report.pictures import grid

    check_output(output)
    path, single = Path(output), []
    if is_folder(output):
        path.mkdir(exist_ok=True)
        for index, made in enumerate(settings):
            place = _free(path / f"{made['seed']:06d}-{slug(made['prompt'])}.png")
            write_picture(grid(images[index : index + 1], 1), place, made)
            single.append(place)
        path = path / SHEET
    columns = columns or min(len(images), 4 if len(images) <= 16 else 8)
    write_picture(grid(images, columns), path, list(settings))
    return [*single, path]


def read_settings(path: Path) -> Any:
    """What :func:`save_images` wrote into a picture: the settings of one image, or those of a sheet in a list; None if nothing."""
    from PIL import Image

    with Image.open(path) as opened:
        found = opened.info.get(KEY) or opened.getexif().get(_DESCRIPTION)
    return None if not found else json.loads(found)


def write_picture(picture: Any, path: Path, settings: Any) -> None:
    """Write a Pillow image at once, with what made it (plain data) in its metadata; see :func:`read_settings`."""
    from PIL import Image, PngImagePlugin

    from liftkit.checkpoint.files import atomic_file

    kind, text, buffer = FORMATS[path.suffix.lower()], json.dumps(settings), io.BytesIO()
    if kind == "PNG":
        chunks = PngImagePlugin.PngInfo()
        chunks.add_itxt(KEY, text)
        picture.save(buffer, kind, pnginfo=chunks)
    else:
        exif = Image.Exif()
        exif[_DESCRIPTION] = text
        picture.save(buffer, kind, exif=exif, quality=95)
    with atomic_file(path) as file:
        file.write(buffer.getvalue())


def _free(path: Path) -> Path:
    """A name that is not taken: the path itself, or with a number after it."""
    number = 2
    place = path
    while place.exists():
        place = path.with_stem(f"{path.stem}-{number}")
        number += 1
    return place


def slug(prompt: str) -> str:
    """The first words of a prompt, as a part of a file's name."""
    return re.sub(r"[^\w]+", "-", prompt.lower()).strip("-_")[:40].strip("-_") or "image"
