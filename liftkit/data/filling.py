"""Fills the caches of training data: pictures are inspected, decoded and encoded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache as once

import torch
from torch import Tensor

from liftkit.color import to_signed
from liftkit.data.cache import Facts, FactsTable, TensorCache
from liftkit.data.images import prefetch
from liftkit.data.picture_errors import PictureError
from liftkit.data.source import CaptionedSource, Size
from liftkit.data.usable import Broken, Picture, give_sizes, is_new, load, of_reference
from liftkit.errors import LiftkitError, UsageError
from liftkit.progress import Observer
from liftkit.tally import Tally

ImageEncoder = Callable[[Tensor], Tensor]
PIXELS_AT_ONCE = 1024 * 1024
TEXTS_NAMED = 10
"""Files of captions that cannot be read, in one message."""


def check_captions(source: CaptionedSource, captions: Sequence[str]) -> None:
    """Raise unless some image of a source has a caption, or nothing there looks as if it held one.

    Args:
        source: of the images.
        captions: of those of its images that are used; empty where one has none.

    Raises:
        UsageError: naming what looks like captions.
    """
    passed_over = "; ".join(text.summary() for text in source.texts if text.lost)
    if passed_over and not any(captions) and not source.has_captions():
        raise UsageError(
            f"{source.name}: no image has a caption, though there is what looks like captions: {passed_over}; put each "
            "into a .txt file of its image's name or into metadata.jsonl, or move these files away to go without"
        )


@dataclass
class Filling:
    """One pass over the sources.

    Args:
        sources: of pictures.
        table: what is known of files.
        workers: threads.
        observer: shows it.

    Attributes:
        tally: of the images that cannot be used; see :meth:`images` for the whole account.
        reasons: by source number, why the last one could not be used.
    """

    sources: Sequence[CaptionedSource]
    table: FactsTable
    workers: int
    observer: Observer
    tally: Tally = field(default_factory=lambda: Tally("images"))
    reasons: dict[int, str] = field(default_factory=dict)

    def inspect(self) -> list[Picture]:
        """All pictures whose files can be opened; files that did not change are not opened again.

        Raises:
            UsageError: naming the captions that cannot be read, for their pictures are sound.
        """
        places = [(number, index) for number, source in enumerate(self.sources) for index in range(len(source))]
        found = []
        texts: list[str] = []
        with self.observer.stage("data: images and captions", len(places), "images") as advance:
            for (number, _), future in prefetch(self._inspected, places, self.workers):
                try:
                    picture = future.result()
                except PictureError as error:
                    self._skip(number, error)
                except UsageError as error:
                    texts.append(str(error))
                else:
                    found.append(picture)
                    for each in (picture, *picture.references):
                        if each.stamp is not None:
                            self.table.put(each.stamp, each.facts)
                advance(1)
        self.table.save()
        if texts:
            for summary in (text.summary() for source in self.sources for text in source.texts):
                if summary:
                    self.observer.note(summary)
            texts = list(dict.fromkeys(texts))
            more = f"; and {len(texts) - TEXTS_NAMED} more" if len(texts) > TEXTS_NAMED else ""
            raise UsageError("; ".join(texts[:TEXTS_NAMED]) + more)
        return found

    def encode(
        self,
        pictures: list[Picture],
        buckets: list[Size],
        at_least: int,
        latents: TensorCache | None,
        make_encoder: Callable[[], ImageEncoder] | None,
    ) -> list[Picture]:
        """Give pictures their sizes, decode those that never were, and cache latents.

        Returns:
            The pictures that can be decoded. Sizes follow from these alone, whatever was broken or cached before.
        """
        make_encoder = once(make_encoder) if make_encoder else None
        try:
            while True:
                give_sizes(pictures, buckets, at_least)
                every = [each for picture in pictures for each in (picture, *picture.references)]
                broken = self._decode([p for p in every if is_new(p, latents)], latents, make_encoder)
                if not broken:
                    return pictures
                pictures = self.without(pictures, broken)
        finally:
            # Interrupted work is kept.
            if latents is not None:
                latents.flush()
            self.table.save()

    def without(self, pictures: list[Picture], broken: Broken) -> list[Picture]:
        """The pictures that are not broken, and not made from broken ones; these are counted as left out."""
        kept = []
        for picture in pictures:
            errors = [broken[each.place] for each in picture.references if each.place in broken]
            if picture.place not in broken and errors:
                self._skip(picture.source, of_reference(self.sources[picture.source].label(picture.index), errors[0]))
            elif picture.place not in broken:
                kept.append(picture)
        return kept

    def check(self, pictures: Sequence[Picture]) -> None:
        """Raise unless each source has images and captions that were meant for them.

        Args:
            pictures: those that are used.

        Raises:
            UsageError: naming the source.
        """
        for number, source in enumerate(self.sources):
            own = [picture for picture in pictures if picture.source == number]
            if not own:
                raise UsageError(
                    f"{source.name}: none of its {len(source)} images can be read ({self.reasons[number]})"
                )
            check_captions(source, [picture.caption for picture in own])

    def note(self, pictures: Sequence[Picture]) -> None:
        """Show what is odd about the pictures of each source."""
        for number, source in enumerate(self.sources):
            own = [picture for picture in pictures if picture.source == number]
            silent = sum(not picture.caption for picture in own)
            if silent:
                self.observer.note(f"{source.name}: {silent} of {len(own)} images have no caption")
            if source.references is not None:
                alone = sum(not picture.references for picture in own)
                self.observer.note(
                    f"{source.name}: {len(own) - alone} images are made from others, {alone} from prompts alone"
                )
            small = sum(p.facts.height < p.size[0] or p.facts.width < p.size[1] for p in own)
            if small:
                self.observer.note(
                    f"{source.name}: {small} of {len(own)} images are smaller than in training, and are enlarged"
                )

    def images(self, pictures: Sequence[Picture]) -> Tally:
        """The account of the sources' images.

        Args:
            pictures: those that are used.
        """
        total = sum((source.tally for source in self.sources), self.tally + Tally(self.tally.what))
        total.use(len(pictures))
        for picture in pictures:
            total.remark(self.sources[picture.source].label(picture.index), picture.facts.remark)
        return total

    def _inspected(self, place: tuple[int, int]) -> Picture:
        number, index = place
        source = self.sources[number]
        picture = Picture(number, index, *self._known(source, index), source.caption(index))
        others = source.references
        if others is not None:
            try:
                picture.references = tuple(
                    Picture(number, each, *self._known(others, each), "", beside=True)
                    for each in source.made_from(index)
                )
            except PictureError as error:
                raise of_reference(source.label(index), error) from error
        return picture

    def _known(self, source: CaptionedSource, index: int) -> tuple[str | None, Facts]:
        """A picture's stamp and facts, which are taken where its file is new."""
        stamp = source.stamp(index)
        facts = self.table.get(stamp) if stamp is not None else None
        return stamp, facts or Facts(source.key(index), *source.size(index), remark=source.remark(index))

    def _decode(
        self, pictures: list[Picture], latents: TensorCache | None, make_encoder: Callable[[], ImageEncoder] | None
    ) -> Broken:
        """Decode pictures, encode them; what is wrong with those that are broken, by their places."""
        broken: Broken = {}
        if not pictures:
            return broken
        waiting: dict[Size, dict[str, Tensor]] = {}

        def encode(size: Size) -> None:
            if latents is not None and make_encoder is not None and waiting.get(size):
                latents.add(_encoded(make_encoder(), waiting.pop(size)))

        title = "data: decoding" if latents is None else "cache: latents"
        with self.observer.stage(title, len(pictures), "images") as advance:
            for picture, future in prefetch(lambda p: load(self.sources[p.source], p), pictures, self.workers):
                advance(1)
                try:
                    image = future.result()
                except PictureError as error:
                    broken[picture.place] = error
                    if not picture.beside:
                        self._skip(picture.source, error)
                    continue
                if picture.stamp is not None:
                    picture.facts = replace(picture.facts, decoded=True)
                    self.table.put(picture.stamp, picture.facts)
                if latents is None or picture.latents_key in latents:
                    continue
                batch = waiting.setdefault(picture.size, {})
                batch[picture.latents_key] = image
                if len(batch) == _batch_size(picture.size):
                    encode(picture.size)
            for size in list(waiting):
                encode(size)
        return broken

    def _skip(self, number: int, error: PictureError) -> None:
        self.reasons[number] = str(error)
        self.tally.leave_out(error.name, error.reason)


def _batch_size(size: Size) -> int:
    return max(1, min(16, PIXELS_AT_ONCE // (size[0] * size[1])))


def _encoded(encoder: ImageEncoder, images: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Cache entries of images of one size, encoded in a batch that is always full.

    In float32 a VAE's result depends on the batch's shape. With one shape an image has the same latents whatever
    part or resumed run it falls into.
    """
    batch = to_signed(torch.stack(list(images.values())))
    full = _batch_size((batch.shape[-2], batch.shape[-1]))
    latents = encoder(torch.cat([batch, batch[-1:].expand(full - len(batch), -1, -1, -1)]))[: len(batch)].float().cpu()
    for key, values in zip(images, latents):
        if not values.isfinite().all():
            raise LiftkitError(f"latents of image {key} are not finite; run the VAE in float32")
    return {key: {"latents": _compact(values)} for key, values in zip(images, latents)}


def _compact(values: Tensor) -> Tensor:
    """In half precision where its range suffices."""
    half = values.half()
    return half if half.isfinite().all() else values
