"""Images for a fit: any folder that Pillow reads, or the demo data, as tensors of equal size in batches."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from liftkit.errors import UsageError

ENDINGS = frozenset(
    ("avif", "bmp", "gif", "heic", "jfif", "jp2", "jpeg", "jpg", "pgm", "png", "ppm", "tif", "tiff", "webp")
)


@dataclass
class Skipped:
    """Images that could not be used, by reason."""

    unreadable: list[str] = field(default_factory=list)
    too_small: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.unreadable) + len(self.too_small)

    def summary(self, show: int = 3) -> str:
        """One line that counts and names them; empty if there are none."""
        parts = []
        for names, what in ((self.unreadable, "unreadable"), (self.too_small, "smaller than a patch")):
            if names:
                more = f" and {len(names) - show} more" if len(names) > show else ""
                parts.append(f"{len(names)} {what} ({', '.join(names[:show])}{more})")
        return "skipped images: " + "; ".join(parts) if parts else ""


class ImageSource(Protocol):
    """Where images come from, in a fixed order."""

    skipped: Skipped

    def __len__(self) -> int: ...

    def images(self, resolution: int, multiple: int) -> Iterator[Tensor]:
        """Images as uint8 (3, H, W), sides at most ``resolution`` and divisible by ``multiple``."""

    def describe(self) -> dict[str, Any]:
        """Plain data for reports."""


class ImageFolder:
    """All images below a folder, shuffled by seed.

    Args:
        path: the folder; nested folders count.
        count: how many to use at most; None for all.
        seed: of the order.

    Raises:
        UsageError: if the folder is missing or holds no image file.
    """

    def __init__(self, path: str | Path, count: int | None = None, seed: int = 0) -> None:
        self.path = Path(path).expanduser()
        if not self.path.is_dir():
            raise UsageError(f"--images {path}: no such folder; give a folder of images, or 'demo'")
        files = sorted(p for p in self.path.rglob("*") if p.suffix.lower().lstrip(".") in ENDINGS and p.is_file())
        if not files:
            raise UsageError(f"--images {path}: no image files ({', '.join(sorted(ENDINGS)[:6])}, ...) in this folder")
        order = np.random.Generator(np.random.PCG64(seed)).permutation(len(files))
        self.files = [files[index] for index in order]
        self.count = min(count, len(files)) if count is not None else len(files)
        self.skipped = Skipped()

    def __len__(self) -> int:
        return self.count

    def images(self, resolution: int, multiple: int) -> Iterator[Tensor]:
        """See :class:`ImageSource`; decodes ahead in threads, and unreadable files are replaced by later ones."""
        return islice(self._readable(resolution, multiple), self.count)

    def _readable(self, resolution: int, multiple: int) -> Iterator[Tensor]:
        with ThreadPoolExecutor(max_workers=4) as pool:
            pending = iter(self.files)
            ahead = [(path, pool.submit(load_image, path, resolution, multiple)) for path in islice(pending, 16)]
            while ahead:
                path, future = ahead.pop(0)
                following = next(pending, None)
                if following is not None:
                    ahead.append((following, pool.submit(load_image, following, resolution, multiple)))
                name = path.relative_to(self.path).as_posix()
                try:
                    image = future.result()
                except (OSError, ValueError, SyntaxError, EOFError, MemoryError) as error:
                    # Pillow reports broken files by all of these.
                    names = self.skipped.too_small if isinstance(error, TooSmall) else self.skipped.unreadable
                    if name not in names:  # a source may be read more than once
                        names.append(name)
                    continue
                yield image

    def describe(self) -> dict[str, Any]:
        """See :class:`ImageSource`."""
        return {"source": "folder", "name": self.path.name, "files": len(self.files), "used": self.count}


class DemoImages:
    """The embedded demo data as an image source.

    Args:
        count: how many.
        split: ``train`` or ``heldout``.
        seed: of the data.
    """

    def __init__(self, count: int, split: Any = "train", seed: int = 0) -> None:
        self.count, self.split, self.seed = count, split, seed
        self.skipped = Skipped()

    def __len__(self) -> int:
        return self.count

    def images(self, resolution: int, multiple: int) -> Iterator[Tensor]:
        """See :class:`ImageSource`."""
        from liftkit.data import demo

        side = min(resolution, demo.SIZE) // multiple * multiple
        if side == 0:
            raise UsageError(
                f"--images demo: the demo images of {demo.SIZE} pixels are smaller than a patch of {multiple}"
            )
        for index in range(self.count):
            image, _ = demo.image_at(index, split=self.split, seed=self.seed)
            yield torch.from_numpy(np.ascontiguousarray(image[:side, :side].transpose(2, 0, 1)))

    def describe(self) -> dict[str, Any]:
        """See :class:`ImageSource`."""
        return {"source": "demo", "split": self.split, "seed": self.seed, "used": self.count}


class TooSmall(ValueError):
    """An image smaller than a patch."""


def load_image(path: Path, resolution: int, multiple: int) -> Tensor:
    """One image file as uint8 (3, S, S): upright, on white where transparent, shrunk (never enlarged) and cropped
    about its centre.

    Args:
        path: any file that Pillow reads.
        resolution: the side at most.
        multiple: the side is divisible by this.

    Raises:
        OSError: if Pillow cannot read it.
        TooSmall: if it is smaller than ``multiple``.
    """
    from PIL import Image, ImageOps

    with Image.open(path) as file:
        file.draft("RGB", (resolution, resolution))
        image: Any = ImageOps.exif_transpose(file)
        if "transparency" in image.info or "A" in image.getbands():
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        elif image.mode.startswith("I"):
            # 16-bit greyscale: Pillow would clip it to white.
            image = Image.fromarray((np.asarray(image, dtype=np.float64) / 256.0).clip(0, 255).astype(np.uint8))
        image = image.convert("RGB")
    side = min(resolution, min(image.size)) // multiple * multiple
    if side == 0:
        raise TooSmall(f"{path}: {image.width} x {image.height} pixels, smaller than a patch of {multiple}")
    square = ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(square).transpose(2, 0, 1).copy())


def batches(images: Iterator[Tensor], size: int) -> Iterator[Tensor]:
    """Neighbouring images of equal shape as float32 batches (B, 3, H, W) in [-1, 1], B <= ``size``."""
    waiting: list[Tensor] = []
    for image in images:
        if waiting and (len(waiting) == size or waiting[0].shape != image.shape):
            yield to_signed(torch.stack(waiting))
            waiting = []
        waiting.append(image)
    if waiting:
        yield to_signed(torch.stack(waiting))


def to_signed(images: Tensor) -> Tensor:
    """uint8 images to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1.0


def open_images(images: str, count: int, seed: int = 0) -> ImageSource:
    """The image source of ``--images``: ``demo``, or a folder.

    Raises:
        UsageError: if a folder is missing or empty.
    """
    return DemoImages(count, seed=seed) if images == "demo" else ImageFolder(images, count, seed)
