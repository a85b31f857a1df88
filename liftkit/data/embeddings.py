"""Embeddings of prompts, made once and kept: of a prompt alone, or of one that is read together with pictures."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from liftkit.data.cache import TensorCache
from liftkit.data.picture_errors import PictureError
from liftkit.data.usable import Broken, Picture
from liftkit.errors import LiftkitError
from liftkit.progress import Observer

PromptEncoder = Callable[[list[str]], dict[str, Tensor]]
PairEncoder = Callable[[str, list[Tensor]], dict[str, Tensor]]
Prompt = tuple[str, tuple[Picture, ...]]
"""A prompt, and the pictures that its image was made from."""
PROMPTS_AT_ONCE = 8


class Embeddings:
    """The transformer's arguments for prompts.

    Args:
        cache: where they are kept.
        make_encoder: called only where some are missing, it returns what makes them (B, ...) of prompts, padded to one length.
        make_pair_encoder: the same for prompts that are read together with their pictures, uint8 (3, H, W) each: it makes those of
            one prompt, (L, ...), as long as they are. None for models that read prompts alone.
    """

    def __init__(
        self,
        cache: TensorCache,
        make_encoder: Callable[[], PromptEncoder],
        make_pair_encoder: Callable[[], PairEncoder] | None = None,
    ) -> None:
        self.cache, self._make_encoder, self._make_pair_encoder = cache, make_encoder, make_pair_encoder
        self._longest: dict[str, int] = {}

    def get(self, prompt: str, references: tuple[Picture, ...] = ()) -> dict[str, Tensor]:
        """Those of a prompt, which :meth:`fill` was given; with zeros behind where prompts are read together with pictures,
        whose number of tokens differs."""
        found = self.cache.get(self._key(prompt, references))
        return {name: _extended(value, self._longest.get(name, 0)) for name, value in found.items()}

    def fill(self, wanted: Iterable[Prompt], image: Callable[[Picture], Tensor], observer: Observer) -> Broken:
        """Make what is missing; of pictures that cannot be read, nothing.

        Args:
            wanted: prompts, with the pictures that their images were made from.
            image: loads one of these, or raises :class:`PictureError`.
            observer: shows it.

        Returns:
            What is wrong with the pictures that cannot be read, by their places. :meth:`get` works once there are none.

        Raises:
            LiftkitError: if embeddings of prompts alone are not of one shape.
        """
        every = {self._key(*each): each for each in wanted}
        pairs = {key: each for key, each in every.items() if self._make_pair_encoder is not None and each[1]}
        alone = {key: prompt for key, (prompt, _) in every.items() if key not in pairs}
        if alone or not pairs:
            self._fill_alone({prompt_key(""): "", **alone}, observer)
        broken = self._fill_pairs({key: pairs[key] for key in self.cache.missing(pairs)}, image, observer)
        for key in every if pairs and not broken else ():
            for name, length in self.cache.lengths(key).items():
                self._longest[name] = max(length, self._longest.get(name, 0))
        return broken

    def _key(self, prompt: str, references: tuple[Picture, ...]) -> str:
        return prompt_key(prompt, references if self._make_pair_encoder is not None else ())

    def _fill_alone(self, wanted: dict[str, str], observer: Observer) -> None:
        new = [wanted[key] for key in self.cache.missing(wanted)]
        if not new:
            return
        encoder = self._make_encoder()
        with observer.stage("cache: prompt embeddings", len(new), "prompts") as advance:
            try:
                for start in range(0, len(new), PROMPTS_AT_ONCE):
                    part = new[start : start + PROMPTS_AT_ONCE]
                    # One shape for all calls: an embedding is the same whichever part or resumed run it falls into.
                    result = encoder(part + [""] * (PROMPTS_AT_ONCE - len(part)))
                    rows = [{name: tensor[row] for name, tensor in result.items()} for row in range(len(part))]
                    self.cache.add({prompt_key(prompt): row for prompt, row in zip(part, rows)})
                    _check_shapes(part[0], rows[0], self.cache.get(prompt_key("")))
                    advance(len(part))
            finally:
                self.cache.flush()

    def _fill_pairs(self, new: dict[str, Prompt], image: Callable[[Picture], Tensor], observer: Observer) -> Broken:
        broken: Broken = {}
        if not new or self._make_pair_encoder is None:
            return broken
        encoder = self._make_pair_encoder()
        with observer.stage("cache: embeddings of prompts with pictures", len(new), "prompts") as advance:
            try:
                for key, (prompt, references) in new.items():
                    images = []
                    for each in references:
                        try:
                            images.append(image(each))
                        except PictureError as error:
                            broken[each.place] = error
                    if len(images) == len(references):
                        self.cache.add({key: encoder(prompt, images)})
                    advance(1)
            finally:
                self.cache.flush()
        return broken


def prompt_key(prompt: str, references: tuple[Picture, ...] = ()) -> str:
    """Of a prompt's embedding in a cache; pictures that it is read together with count by their content and size."""
    shown = "\0".join([prompt, *(each.latents_key for each in references)])
    return hashlib.sha256(shown.encode(errors="surrogatepass")).hexdigest()


def _extended(value: Tensor, length: int) -> Tensor:
    missing = length - len(value) if value.ndim else 0
    return torch.cat([value, value.new_zeros(missing, *value.shape[1:])]) if missing > 0 else value


def _check_shapes(prompt: str, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    shapes, wanted = ({name: tuple(tensor.shape) for name, tensor in sorted(row.items())} for row in (found, expected))
    if shapes != wanted:
        raise LiftkitError(
            f"embeddings of {prompt!r} have the shapes {shapes}, those of the empty prompt {wanted}; pad prompts to one length"
        )
