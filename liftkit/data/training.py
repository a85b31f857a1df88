"""Training batches from captioned sources: cached latents and prompt embeddings, an order without state.

``batch(step)`` is a pure function of the seed and the step: a resumed run continues exactly, and each of several
processes takes its own rows of the same global batch.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from itertools import chain, cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from liftkit.data.batch import Batch, Row
from liftkit.data.buckets import bucket_sizes, square
from liftkit.data.cache import FactsTable, TensorCache
from liftkit.data.embeddings import Embeddings, PairEncoder, Prompt, PromptEncoder
from liftkit.data.filling import Filling, ImageEncoder
from liftkit.data.images import prefetch
from liftkit.data.order import DROPOUT, MIRROR, Order, chances
from liftkit.data.picture_errors import PictureError
from liftkit.data.source import CaptionedSource
from liftkit.data.usable import Picture, load
from liftkit.errors import LiftkitError, UsageError
from liftkit.progress import Observer, Silent
from liftkit.tally import Tally, combined

ALL = slice(None)
FIRST_STEPS = 64
"""Among which previews look for pairs."""


class TrainingData:
    """Images with captions, mixed by weight.

    Args:
        sources: with their weights, which need not sum to 1. A source's share of images is its weight's share.
        resolution: side of the images, or with buckets of a square of their area, in pixels.
        multiple: sides are divisible by this: the pixels of one token.
        buckets: whether to keep aspect ratios, about; all images of one step then have one size.
        batch_size: images a step, over all processes.
        seed: of order and prompt dropout.
        prompt_dropout: chance in [0, 1] that an image is trained with the empty prompt.
        cache: folder of the caches.
        workers: threads that decode; with 0, :meth:`prefetch` decodes as it goes.
        flip: chance in [0, 1] that an image is mirrored; 0 where latents are cached.

    Attributes:
        tally: of the images, also those that :meth:`batch` could not read any more.
        lost: names and reasons of those that went away since they were last named; whoever names them empties it.
        digest: tells images, captions and sizes from others; after :meth:`prepare`.

    Raises:
        UsageError: if a number is out of range or the cache's folder cannot be used.
    """

    def __init__(
        self,
        sources: list[tuple[CaptionedSource, float]],
        *,
        resolution: int,
        multiple: int,
        buckets: bool,
        batch_size: int,
        seed: int,
        prompt_dropout: float,
        cache: Path,
        workers: int,
        flip: float = 0.0,
    ) -> None:
        if not sources:
            raise UsageError("training data: no source; give at least one")
        for source, weight in sources:
            if not 0.0 < weight < float("inf"):
                raise UsageError(f"source {source.name}: a weight of {weight}; expected a number above 0")
        if batch_size < 1:
            raise UsageError(f"batch size {batch_size}: expected at least 1")
        if not 0.0 <= prompt_dropout <= 1.0:
            raise UsageError(f"prompt dropout {prompt_dropout}: expected a chance in [0, 1]")
        self.sources = [source for source, _ in sources]
        self.weights = [weight for _, weight in sources]
        self.sizes = bucket_sizes(resolution, multiple) if buckets else [square(resolution, multiple)]
        self.batch_size, self.seed, self.prompt_dropout = batch_size, seed, prompt_dropout
        self.cache, self.workers, self.flip = Path(cache), workers, flip
        self.tally = Tally("images")
        self.lost: list[tuple[str, str]] = []
        self._pictures: dict[tuple[int, int], Picture] = {}
        self._latents: TensorCache | None = None

    def prepare(
        self,
        make_image_encoder: Callable[[], ImageEncoder] | None,
        image_fingerprint: str,
        make_prompt_encoder: Callable[[], PromptEncoder],
        prompt_fingerprint: str,
        observer: Observer | None = None,
        extra_prompts: Sequence[str] = (),
        make_pair_encoder: Callable[[], PairEncoder] | None = None,
    ) -> Tally:
        """Fill the caches and fix the order; needed once before the first batch.

        With several processes one prepares alone first; the others find the caches complete.

        Args:
            make_image_encoder: called only if latents are missing, it returns what makes normalized latents
                (B, C, h, w) of images (B, 3, H, W) in [-1, 1] on the CPU. None for batches without latents.
            image_fingerprint: of the VAE; another one, other latents.
            make_prompt_encoder: called only if embeddings are missing, it returns what makes the transformer's arguments
                (B, ...) of prompts, padded to one length.
            prompt_fingerprint: of the text encoders, and of how they are called.
            observer: shows progress and anything odd.
            extra_prompts: embedded too, for :meth:`prompts`, in turns with the pictures of :meth:`first_pairs`.
            make_pair_encoder: of models that read prompts together with the pictures that images were made from, see
                :class:`Embeddings`.

        Returns:
            The account of images; those that cannot be read are left out of the order.

        Raises:
            UsageError: if a source has no usable image, captions cannot be read, or files of captions are there and not one
                image has a caption.
            LiftkitError: if the disk refuses, latents are not finite, or embeddings differ in shape.
        """
        observer = observer or Silent()
        filling = Filling(self.sources, FactsTable(self.cache / "files.json"), max(1, self.workers), observer)
        prompts = TensorCache(self.cache / "prompts", prompt_fingerprint)
        self._embeddings = Embeddings(prompts, make_prompt_encoder, make_pair_encoder)
        self._latents = TensorCache(self.cache / "latents", image_fingerprint) if make_image_encoder else None
        for damaged in (cache.damaged for cache in (self._latents, prompts) if cache is not None):
            if damaged:
                observer.note(f"damaged parts of the cache were made anew: {', '.join(damaged)}")
        pictures, broken = filling.inspect(), None
        # Without an image that went away others may have another size.
        while broken is None or broken:
            pictures = filling.without(pictures, broken or {})
            pictures = filling.encode(pictures, self.sizes, self.batch_size, self._latents, make_image_encoder)
            filling.check(pictures)
            if broken is None:
                filling.note(pictures)
            self._arrange(pictures)
            broken = self._embeddings.fill(
                self._spoken(pictures, extra_prompts), lambda each: load(self.sources[each.source], each), observer
            )
        self.tally = filling.images(pictures)
        self.digest = self._digest()
        return self.tally

    def _arrange(self, pictures: Sequence[Picture]) -> None:
        """Fix the order of the pictures that are used."""
        self._pictures = {(picture.source, picture.index): picture for picture in pictures}
        groups: dict[tuple[int, ...], dict[int, list[int]]] = {}
        for picture in pictures:
            groups.setdefault(picture.group, {}).setdefault(picture.source, []).append(picture.index)
        self._order = Order(groups, self.weights, self.batch_size, self.seed)

    def batch(self, step: int, part: slice = ALL) -> Batch:
        """The batch of a step.

        Args:
            step: any integer >= 0; the data never run out.
            part: rows of the global batch to take.

        Raises:
            LiftkitError: if an image cannot be read any more, nor any other of its kind. One that cannot be read gives
                its row to the next of its source and size, and is named in :attr:`tally`.
        """
        return Batch.of(self._rows(step, range(self.batch_size)[part]))

    def prompts(self, captions: Sequence[str], step: int | None = None) -> dict[str, Tensor]:
        """The transformer's arguments for prompts that :meth:`prepare` embedded, (n, ...) each.

        Args:
            captions: the prompts.
            step: a step of pairs. Models that read prompts together with pictures are shown its references, in turns; None: none.
        """
        rows = [self._embeddings.get(*each) for each in zip(captions, cycle(self._made_from(step)))]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def captions(self, step: int) -> list[str]:
        """The captions of a step's images, none of them dropped."""
        places = (self._order.row(step, row) for row in range(self.batch_size))
        return [self._pictures[place].caption for place in places]

    def first_pairs(self) -> int | None:
        """The first step whose images were made from others, among :data:`FIRST_STEPS`."""
        steps = (step for step in range(FIRST_STEPS) if self._pictures[self._order.row(step, 0)].references)
        return next(steps, None)

    def _made_from(self, step: int | None) -> list[tuple[Picture, ...]]:
        """The references of each image of a step."""
        rows = range(self.batch_size) if step is not None else ()
        return [self._pictures[self._order.row(step or 0, row)].references for row in rows] or [()]

    def _spoken(self, pictures: Sequence[Picture], extra: Sequence[str]) -> Iterator[Prompt]:
        """The prompts of training and of previews, with the pictures that their images were made from."""
        beside = self._made_from(self.first_pairs())
        yield from zip(extra, cycle(beside))
        yield from (("", references) for references in beside)
        for picture in pictures:
            yield picture.caption, picture.references
            if self.prompt_dropout:
                yield "", picture.references

    def prefetch(self, first: int, last: int, part: slice = ALL) -> Iterator[Batch]:
        """The batches of steps ``first`` to ``last`` - 1, two of them decoded ahead by threads."""
        rows = range(self.batch_size)[part]
        if self.workers < 1:
            yield from (self.batch(step, part) for step in range(first, last))
            return
        # A thread's share at once: handing over single rows of small images takes as long as to read them.
        share = -(-len(rows) // self.workers)
        parts = [rows[start : start + share] for start in range(0, len(rows), share)]
        places = ((step, some) for step in range(first, last) for some in parts)
        with closing(prefetch(lambda place: self._rows(*place), places, self.workers, 2 * len(parts))) as loaded:
            waiting: list[Row] = []
            for _, future in loaded:
                waiting += future.result()
                if len(waiting) == len(rows):
                    yield Batch.of(waiting)
                    waiting = []

    def describe(self) -> dict[str, Any]:
        """Plain data for reports, with the accounts of images and captions."""
        sizes = Counter(picture.size for picture in self._pictures.values())
        return {
            "sources": [{**source.describe(), "weight": weight} for source, weight in zip(self.sources, self.weights)],
            "images": len(self._pictures),
            "tallies": [tally.to_json() for tally in self.tallies()],
            "sizes": {f"{height}x{width}": count for (height, width), count in sorted(sizes.items())},
            "batch_size": self.batch_size,
            "seed": self.seed,
            "prompt_dropout": self.prompt_dropout,
            "digest": self.digest,
        }

    def _digest(self) -> str:
        digest = hashlib.sha256()
        for (source, _), picture in sorted(self._pictures.items()):
            made_from = [each.facts.key for each in picture.references]
            facts = (source, picture.facts.key, picture.size, picture.caption, *([made_from] if made_from else []))
            digest.update(repr(facts).encode())
        return digest.hexdigest()

    def tallies(self) -> list[Tally]:
        """The accounts of images, of lines of metadata and of caption files; without those that counted nothing."""
        return combined([self.tally, *(text for source in self.sources for text in source.texts)])

    def lose(self, name: str, reason: str) -> None:
        """Count an image that was used and cannot be read any more."""
        if name not in self.tally.left_out.get(reason, {}):
            self.tally.leave_out(name, reason)
            self.tally.use(-1)
            self.lost.append((name, reason))

    def _rows(self, step: int, rows: range) -> list[Row]:
        return [self._row(step, row) for row in rows]

    def _row(self, step: int, row: int) -> Row:
        source, index = self._order.row(step, row)
        picture, (image, *references) = self._loaded(self._pictures[source, index])
        dropped = chances(self.seed, DROPOUT, step, self.batch_size)[row] < self.prompt_dropout
        caption = "" if dropped else picture.caption
        if self.flip and chances(self.seed, MIRROR, step, self.batch_size)[row] < self.flip:
            image, *references = (each.flip(2) for each in (image, *references))
        prompts = self._embeddings.get(caption, picture.references)
        place = (picture.source, picture.index)
        latents, *others = (self._latents_of(each) for each in (picture, *picture.references))
        known = [each for each in others if each is not None]
        return Row(image, latents, prompts, caption, place, references, known)

    def _latents_of(self, picture: Picture) -> Tensor | None:
        return None if self._latents is None else self._latents.get(picture.latents_key)["latents"].float()

    def _loaded(self, picture: Picture) -> tuple[Picture, list[Tensor]]:
        """A picture with its image and its references; the next one's where one of them went away."""
        source = self.sources[picture.source]
        others = (
            self._pictures[picture.source, index]
            for index in self._order.after(picture.group, picture.source, picture.index)
        )
        for each in chain([picture], others):
            try:
                return each, [load(source, one) for one in (each, *each.references)]
            except PictureError as error:
                self.lose(source.label(each.index), error.reason)
        raise LiftkitError(
            f"{source.name}: none of its images of {picture.size} can be read any more; is the disk there?"
        )
