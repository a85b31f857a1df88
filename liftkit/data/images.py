"""Images for a fit: a folder, or the demo data, as tensors of equal size in batches."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from liftkit.checkpoint.files import expanded
from liftkit.data.picture_errors import TOO_SMALL, PictureError
from liftkit.data.picture_files import scan
from liftkit.data.pictures import READER, decoded, look, open_picture_file
from liftkit.errors import UsageError
from liftkit.tally import Tally

if TYPE_CHECKING:
    from PIL.Image import Image

DECODERS = 4

Item = TypeVar("Item")
Result = TypeVar("Result")


class ImageSource(Protocol):
    """Where images come from, in a fixed order."""

    tally: Tally

    def __len__(self) -> int: ...

    def images(self, resolution: int, multiple: int, which: range | None = None) -> Iterator[tuple[int, Tensor]]:
        """Images with their places in the order.

        Args:
            resolution: sides at most, in pixels.
            multiple: sides are divisible by this.
            which: places to take; all if left out. Images that cannot be used are passed over and counted in ``tally``.

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

    Attributes:
        tally: of the images that are asked for, and of what lies beside them and is left out.

    Raises:
        UsageError: if the folder is missing or holds no image file.
    """

    def __init__(self, path: str | Path, count: int | None = None, seed: int = 0) -> None:
        self.path = expanded(path)
        check_folder(self.path, f"--images {path}", "give a folder of images, or 'demo'")
        found = scan(self.path)
        self.tally = found.tally
        if not found.pictures:
            raise UsageError(f"--images {path}: {no_pictures(found.tally)}")
        order = np.random.Generator(np.random.PCG64(seed)).permutation(len(found.pictures))
        self.files = [found.pictures[index] for index in order[:count]]
        self.found = len(found.pictures)
        self._used: set[int] = set()

    def __len__(self) -> int:
        return len(self.files)

    def images(self, resolution: int, multiple: int, which: range | None = None) -> Iterator[tuple[int, Tensor]]:
        """See :class:`ImageSource`; decodes ahead in threads."""
        places = which if which is not None else range(len(self.files))
        for place, future in prefetch(lambda place: self._image(place, resolution, multiple), places):
            image = self._result(place, future)
            if image is not None:
                yield place, image

    def _image(self, place: int, resolution: int, multiple: int) -> tuple[Tensor, str]:
        """A decoded image, and a remark on it."""
        path, name = self.files[place], self._name(place)
        with open_picture_file(path, name) as file:
            remark = look(file, name).remark
            with decoded(file, name, resolution) as image:
                return fitted(image, name, resolution, multiple), remark

    def _result(self, place: int, future: Future[tuple[Tensor, str]]) -> Tensor | None:
        """A decoded image, or None and a note of why not."""
        name = self._name(place)
        try:
            image, remark = future.result()
        except PictureError as error:
            self.tally.leave_out(name, error.reason)
            return None
        self._used.add(place)  # a source may be read more than once
        self.tally.used = len(self._used)
        self.tally.remark(name, remark)
        return image

    def _name(self, place: int) -> str:
        return self.files[place].relative_to(self.path).as_posix()

    def describe(self) -> dict[str, Any]:
        """See :class:`ImageSource`."""
        chosen = "".join(f"{self._name(place)}\n{path.stat().st_size}\n" for place, path in enumerate(self.files))
        digest = hashlib.sha256(f"{READER}\n{chosen}".encode(errors="surrogateescape")).hexdigest()
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
        self.tally = Tally("images")

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


def check_folder(path: Path, what: str, instead: str) -> None:
    """Raise unless a path is a folder.

    Args:
        path: of the folder.
        what: what to call it in a message.
        instead: what to do else.

    Raises:
        UsageError: if it is not.
    """
    if not path.exists():
        raise UsageError(f"{what}: no such folder; {instead}")
    if not path.is_dir():
        raise UsageError(f"{what}: a file, not a folder; {instead}")


def no_pictures(tally: Tally) -> str:
    """What to tell of a folder that holds no picture that is read."""
    if tally.lost:
        return f"no image that is read in this folder; left out: {tally.reasons()}"
    return "no image files (.png, .jpg, .webp, .tif, ...) in this folder"


def prefetch(
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


BROKEN = (PictureError,)
"""What :func:`load_image` raises for a picture that cannot be read; for scripts of users, as the function is."""


def load_image(path: Path, resolution: int, multiple: int) -> Tensor:
    """One image file as a fit sees it, uint8 (3, S, S): upright, in sRGB, shrunk and cropped about its center.

    Args:
        path: of the file.
        resolution: the side at most.
        multiple: the side is divisible by this.

    Raises:
        PictureError: if it cannot be read, or is smaller than ``multiple``.
    """
    name = str(path)
    with open_picture_file(path, name) as file, decoded(file, name, resolution) as image:
        return fitted(image, name, resolution, multiple)


def fitted(image: Image, name: str, resolution: int, multiple: int) -> Tensor:
    """The largest square of whole tokens of an RGB picture, uint8 (3, S, S).

    Raises:
        PictureError: if the picture is smaller than ``multiple``.
    """
    side = min(resolution, *image.size) // multiple * multiple
    if side == 0:
        size = f"{image.width} x {image.height} pixels, a patch is {multiple}"
        raise PictureError(name, TOO_SMALL, size)
    return covered(image, side, side)


def covered(image: Image, height: int, width: int) -> Tensor:
    """An RGB picture resized to cover a size and cropped about its center, uint8 (3, height, width)."""
    from PIL import Image, ImageOps

    fitted = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(fitted).transpose(2, 0, 1).copy())


def adm_cropped(image: Image, height: int, width: int) -> Tensor:
    """An RGB picture as ADM prepares ImageNet: halved by boxes while it is twice too large, then bicubic to cover the size, and
    cropped about its center; uint8 (3, height, width)."""
    from PIL import Image

    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    pixels = np.asarray(image.crop((left, top, left + width, top + height)))
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


CROPS: dict[str, Callable[[Image, int, int], Tensor]] = {"lanczos": covered, "adm": adm_cropped}
"""Ways to bring a picture to a size, by name."""


def batches(images: Iterator[tuple[int, Tensor]], size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Neighboring images of equal shape, ``size`` at most.

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


def open_images(images: str, count: int, seed: int = 0) -> ImageSource:
    """The image source of ``--images``: ``demo``, or a folder.

    Raises:
        UsageError: if a folder is missing or empty.
    """
    return DemoImages(count, seed=seed) if images == "demo" else ImageFolder(images, count, seed)
