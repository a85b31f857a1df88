"""One usable image of the training data: which one it is, the size that it is trained at, and what it was made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from liftkit.data.buckets import assign_buckets
from liftkit.data.cache import Facts, TensorCache
from liftkit.data.picture_errors import PictureError
from liftkit.data.source import CaptionedSource, Size


@dataclass(slots=True)
class Picture:
    """One usable image of a source.

    Args:
        source, index: which one.
        stamp: what it was when its facts were taken.
        facts: key and size.
        caption: its caption.
        size: height and width that it is trained at.
        beside: whether ``index`` is one of the source's references.
        references: the pictures that it was made from, which are cut to its own size.
    """

    source: int
    index: int
    stamp: str | None
    facts: Facts
    caption: str
    size: Size = (0, 0)
    beside: bool = False
    references: tuple[Picture, ...] = ()

    @property
    def group(self) -> tuple[int, ...]:
        """What the images of one step have in common: their size, and how many references each has, if any."""
        return (*self.size, len(self.references)) if self.references else self.size

    @property
    def place(self) -> tuple[int, int, bool]:
        """Which one it is."""
        return self.source, self.index, self.beside

    @property
    def latents_key(self) -> str:
        """Of its latents in a cache."""
        return f"{self.facts.key}/{self.size[0]}x{self.size[1]}"


Broken = dict[tuple[int, int, bool], PictureError]
"""What is wrong with pictures that cannot be read, by their places."""


def load(source: CaptionedSource, picture: Picture) -> Tensor:
    """The image of a picture of a source or of its references, uint8 (3, height, width).

    Raises:
        PictureError: if it cannot be read, or changed since it was inspected.
    """
    source = within(source, picture)
    if source.stamp(picture.index) != picture.stamp:
        raise PictureError(source.label(picture.index), "changed while it was in use")
    return source.image(picture.index, picture.size)


def within(source: CaptionedSource, picture: Picture) -> CaptionedSource:
    """A source, or its references, whichever a picture is of."""
    if not picture.beside:
        return source
    assert source.references is not None
    return source.references


def of_reference(label: str, error: PictureError) -> PictureError:
    """Why an image cannot be used whose reference cannot be."""
    if error.name == label:
        return error
    return PictureError(label, "made from pictures that cannot be read", f"{error.name}: {error.reason}")


def is_new(picture: Picture, latents: TensorCache | None) -> bool:
    """Whether a picture's latents are missing, or, where no latents are wanted, it was never decoded."""
    if latents is not None:
        return picture.latents_key not in latents
    return picture.stamp is not None and not picture.facts.decoded


def give_sizes(pictures: Sequence[Picture], buckets: list[Size], at_least: int) -> None:
    """Give pictures, and those that they were made from, the sizes that they are trained at: see :func:`assign_buckets`."""
    sizes = assign_buckets([(p.facts.height, p.facts.width) for p in pictures], buckets, at_least)
    for picture, size in zip(pictures, sizes):
        picture.size = size
        for each in picture.references:
            each.size = size
