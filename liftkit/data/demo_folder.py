"""The demonstration data as a folder of pictures with captions, for who has no photographs at hand."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from liftkit.checkpoint.folder import atomic_folder
from liftkit.data import demo
from liftkit.data.metadata import METADATA_LINES
from liftkit.errors import UsageError


def write_images(folder: Path, count: int, *, seed: int = 0) -> None:
    """Write the first ``count`` images as ``000000.png`` and so on, and ``metadata.jsonl`` (``file_name``, ``text``).

    Args:
        folder: what is to be made; whole or not at all.
        count: of the images, each 64 x 64.
        seed: another seed, another data set.

    Raises:
        UsageError: if the folder is there already.
        LiftkitError: if the disk refuses.
    """
    if folder.exists():
        raise UsageError(f"{folder}: exists already; choose another folder with -o, or use the images that are there")
    with atomic_folder(folder) as building:
        lines = []
        for index in range(count):
            image, scene = demo.image_at(index, seed=seed)
            name = f"{index:06d}.png"
            Image.fromarray(image).save(building / name)
            lines.append(json.dumps({"file_name": name, "text": scene.prompt}) + "\n")
        (building / METADATA_LINES).write_text("".join(lines), encoding="utf-8")
