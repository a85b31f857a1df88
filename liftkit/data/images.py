"""Images for a fit: any folder that Pillow reads, or the demo data, as tensors of equal size in batches."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL.Image import DecompressionBombError
from torch import Tensor

from liftkit.errors import UsageError

# Formats that Pillow opens but that are no pictures, or need other programs to draw.
NO_PICTURES = {".pdf", ".ps", ".eps", ".wmf", ".emf", ".h5", ".hdf", ".grib", ".bufr", ".mpg", ".mpeg", ".fits", ".fit"}


DECODERS = 4


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

    def images(self, resolution: int, multiple: int, which: range | None = None) -> Iterator[tuple[int, Tensor]]:
        """Images with their places in the order.

        Args:
            resolution: sides at most, in pixels.
            multiple: sides are divisible by this.
            which: places to take; all if left out. Images that cannot be used are skipped.

        Yields:
            The place, and uint8 (3, H, W).
        """

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
        endings = picture_endings()
        files = sorted(p for p in self.path.rglob("*") if p.suffix.lower() in endings and p.is_file())
        if not files:
            raise UsageError(f"--images {path}: no image files (.png, .jpg, .webp, .tif, ...) in this folder")
        order = np.random.Generator(np.random.PCG64(seed)).permutation(len(files))
        self.files = [files[index] for index in order[:count]]
        self.found = len(files)
        self.skipped = Skipped()

    def __len__(self) -> int:
        return len(self.files)

    def images(self, resolution: int, multiple: int, which: range | None = None) -> Iterator[tuple[int, Tensor]]:
        """See :class:`ImageSource`; decodes ahead in threads."""
        pending = iter(which if which is not None else range(len(self.files)))
        with ThreadPoolExecutor(max_workers=DECODERS) as pool:

            def begin(place: int) -> tuple[int, Future[Tensor]]:
                return place, pool.submit(load_image, self.files[place], resolution, multiple)

            ahead = deque(begin(place) for place in islice(pending, 4 * DECODERS))
            while ahead:
                place, future = ahead.popleft()
                ahead.extend(begin(following) for following in islice(pending, 1))
                image = self._result(place, future)
                if image is not None:
                    yield place, image

    def _result(self, place: int, future: Future[Tensor]) -> Tensor | None:
        """A decoded image, or None and a note of why not."""
        try:
            return future.result()
        except BROKEN as error:
            names = self.skipped.too_small if isinstance(error, TooSmall) else self.skipped.unreadable
            name = self.files[place].relative_to(self.path).as_posix()
            if name not in names:  # a source may be read more than once
                names.append(name)
            return None

    def describe(self) -> dict[str, Any]:
        """See :class:`ImageSource`."""
        chosen = "".join(f"{path.relative_to(self.path).as_posix()}\n{path.stat().st_size}\n" for path in self.files)
        digest = hashlib.sha256(chosen.encode(errors="surrogateescape")).hexdigest()
        name = self.path.resolve().name
        return {"source": "folder", "name": name, "files": self.found, "used": len(self.files), "digest": digest}


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

    def images(self, resolution: int, multiple: int, which: range | None = None) -> Iterator[tuple[int, Tensor]]:
        """See :class:`ImageSource`."""
        from liftkit.data import demo

        side = min(resolution, demo.SIZE) // multiple * multiple
        if side == 0:
            raise UsageError(
                f"--images demo: the demo images of {demo.SIZE} pixels are smaller than a patch of {multiple}"
            )
        for place in which if which is not None else range(self.count):
            image, _ = demo.image_at(place, split=self.split, seed=self.seed)
            yield place, torch.from_numpy(np.ascontiguousarray(image[:side, :side].transpose(2, 0, 1)))

    def describe(self) -> dict[str, Any]:
        """See :class:`ImageSource`."""
        return {"source": "demo", "split": self.split, "seed": self.seed, "used": self.count}


def picture_endings() -> frozenset[str]:
    """Endings of the picture files that this Pillow opens, with their dots."""
    from PIL import Image

    Image.init()
    return frozenset(end for end, kind in Image.registered_extensions().items() if kind in Image.OPEN) - NO_PICTURES


class TooSmall(ValueError):
    """An image smaller than a patch."""


# Pillow and its decoders report broken and hostile files by all of these.
BROKEN = (OSError, ValueError, SyntaxError, EOFError, MemoryError, RuntimeError, DecompressionBombError)


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


def batches(images: Iterator[tuple[int, Tensor]], size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Neighbouring images of equal shape, ``size`` at most.

    Yields:
        Their places (B,), and themselves, float32 (B, 3, H, W) in [-1, 1].
    """
    waiting: list[tuple[int, Tensor]] = []
    for pair in images:
        if waiting and (len(waiting) == size or waiting[0][1].shape != pair[1].shape):
            yield _stacked(waiting)
            waiting = []
        waiting.append(pair)
    if waiting:
        yield _stacked(waiting)


def _stacked(pairs: list[tuple[int, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.tensor([place for place, _ in pairs]), to_signed(torch.stack([image for _, image in pairs]))


def to_signed(images: Tensor) -> Tensor:
    """uint8 images to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1.0


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] to uint8, the inverse of :func:`to_signed`."""
    return ((images.detach().float().clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8)


def open_images(images: str, count: int, seed: int = 0) -> ImageSource:
    """The image source of ``--images``: ``demo``, or a folder.

    Raises:
        UsageError: if a folder is missing or empty.
    """
    return DemoImages(count, seed=seed) if images == "demo" else ImageFolder(images, count, seed)
