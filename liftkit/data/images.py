"""Images for a fit: any folder that Pillow reads, or the demo data, as tensors of equal size in batches."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import torch
from PIL.Image import DecompressionBombError
from torch import Tensor

from liftkit.errors import UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

# Formats that Pillow opens but that are no pictures, or need other programs to draw.
NO_PICTURES = {".pdf", ".ps", ".eps", ".wmf", ".emf", ".h5", ".hdf", ".grib", ".bufr", ".mpg", ".mpeg", ".fits", ".fit"}

DECODERS = 4

Item = TypeVar("Item")
Result = TypeVar("Result")


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
        files = picture_files(self.path)
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
        places = which if which is not None else range(len(self.files))
        for place, future in ahead(lambda place: load_image(self.files[place], resolution, multiple), places):
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


def picture_files(folder: Path) -> list[Path]:
    """All picture files below a folder, in the order of their names."""
    endings = picture_endings()
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in endings and path.is_file())


def ahead(
    work: Callable[[Item], Result], items: Iterable[Item], workers: int = DECODERS, window: int | None = None
) -> Generator[tuple[Item, Future[Result]], None, None]:
    """Items in their order, with work on the next ones done meanwhile by threads.

    Args:
        work: called with each item in a thread.
        items: what to work on.
        workers: threads.
        window: items begun and not yet taken, at most; four a thread if left out.
    """
    pending = iter(items)
    with ThreadPoolExecutor(max_workers=workers) as pool:

        def begin(item: Item) -> tuple[Item, Future[Result]]:
            return item, pool.submit(work, item)

        waiting = deque(begin(item) for item in islice(pending, window or 4 * workers))
        try:
            while waiting:
                item, future = waiting.popleft()
                waiting.extend(begin(following) for following in islice(pending, 1))
                yield item, future
        finally:
            pool.shutdown(cancel_futures=True)


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
    image = read_picture(path, resolution)
    side = min(resolution, min(image.size)) // multiple * multiple
    if side == 0:
        raise TooSmall(f"{path}: {image.width} x {image.height} pixels, smaller than a patch of {multiple}")
    return covered(image, side, side)


def read_picture(file: Path | IO[bytes], resolution: int) -> Image:
    """A picture in RGB: upright, and on white where transparent.

    Args:
        file: any that Pillow reads.
        resolution: a JPEG may be decoded at a reduced size, with neither side under this.

    Raises:
        OSError: if Pillow cannot read it; see :data:`BROKEN` for all that it raises.
    """
    from PIL import Image, ImageOps

    with Image.open(file) as opened:
        opened.draft("RGB", (resolution, resolution))
        image: Any = ImageOps.exif_transpose(opened)
        if "transparency" in image.info or "A" in image.getbands():
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        elif image.mode.startswith("I"):
            # 16-bit greyscale: Pillow would clip it to white.
            image = Image.fromarray((np.asarray(image, dtype=np.float64) / 256.0).clip(0, 255).astype(np.uint8))
        return image.convert("RGB")


def covered(image: Image, height: int, width: int) -> Tensor:
    """An RGB picture resized to cover a size and cropped about its centre, uint8 (3, height, width)."""
    from PIL import Image, ImageOps

    fitted = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(fitted).transpose(2, 0, 1).copy())


def batches(images: Iterator[tuple[int, Tensor]], size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Neighbouring images of equal shape, ``size`` at most.

    Yields:
        Their places (B,), and themselves, uint8 (B, 3, H, W).
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
    return torch.tensor([place for place, _ in pairs]), torch.stack([image for _, image in pairs])


def to_signed(images: Tensor) -> Tensor:
    """uint8 images to float32 in [-1, 1]; others are so already."""
    return images.float() / 127.5 - 1.0 if images.dtype == torch.uint8 else images


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] to uint8, the inverse of :func:`to_signed`."""
    return ((images.detach().float().clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8)


def open_images(images: str, count: int, seed: int = 0) -> ImageSource:
    """The image source of ``--images``: ``demo``, or a folder.

    Raises:
        UsageError: if a folder is missing or empty.
    """
    return DemoImages(count, seed=seed) if images == "demo" else ImageFolder(images, count, seed)
