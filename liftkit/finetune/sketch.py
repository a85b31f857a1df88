"""A run without its weights: what a recipe trains, in tensors that have shapes and dtypes and no memory."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_iter

from liftkit.checkpoint.files import read_safetensors
from liftkit.checkpoint.model import LONG_PROMPT, ModelFolder
from liftkit.color import constant
from liftkit.data.batch import Batch
from liftkit.data.source import Size
from liftkit.finetune.bands import dct_matrix
from liftkit.finetune.encoders import read_together
from liftkit.finetune.recipe import Recipe
from liftkit.finetune.stand_ins import fused_rms_norm
from liftkit.finetune.trainee import COMPUTE, Trainee, check_space, make_trainee
from liftkit.lift import Lift
from liftkit.models.jit import positions, rotations
from liftkit.models.load import load_component, load_transformers
from liftkit.models.registry import architecture
from liftkit.models.spec import Architecture


@dataclass(frozen=True)
class Sketch:
    """What a trainee is made of, without weights.

    Args:
        folder: where it comes from.
        spec: its architecture.
        load: the transformer in a dtype, on the meta device; another one each time.
        lift: A and s; None in latent space.
        tensors: the source's projections and output norm by name; for the loss asymflow.
        text: tokens of a prompt, with those of the pictures that are read together with it.
        references: pictures that each image was made from.
    """

    folder: ModelFolder
    spec: Architecture
    load: Callable[[torch.dtype], Any]
    lift: Lift | None
    tensors: Mapping[str, Tensor]
    text: int = LONG_PROMPT
    references: int = 0

    @classmethod
    def of(cls, recipe: Recipe, folder: ModelFolder) -> Sketch:
        """Of a folder, of which no weight of the transformer is read.

        Raises:
            UsageError: if it is of the wrong space.
        """
        name = folder.class_of("transformer") or ""
        check_space(recipe, folder, name)
        original = folder.path / "latent" / "reference.safetensors"
        return cls(
            folder,
            architecture(name),
            lambda dtype: load_component(folder, "transformer", dtype, device="meta"),
            Lift.load(folder.path / "lift.safetensors").to(torch.device("cpu")) if recipe.space == "pixel" else None,
            read_safetensors(original)[0] if recipe.objective.loss == "asymflow" else {},
            text_tokens(folder),
        )

    def beside(self, shown: Collection[tuple[Size, int]]) -> Sketch:
        """The same with reference images.

        Args:
            shown: sizes of images, and how many references of that size each one has.
        """
        pictures = text_tokens_of_pictures(self.folder, self.spec, shown)
        return replace(self, references=max(count for _, count in shown), text=self.text + pictures)

    def transformer(self, recipe: Recipe) -> Any:
        """That of a recipe, on the meta device."""
        return self.load(torch.float32 if recipe.trainable.mode == "full" else COMPUTE[recipe.precision])

    def trainee(self, recipe: Recipe, transformer: Any) -> Trainee:
        """What the recipe trains, within :func:`without_memory`.

        Raises:
            UsageError: if the recipe names modules that are not there.
        """
        placed(transformer)
        # Older versions of torch copy nothing from the meta device, not even to tensors without memory.
        tensors = {name: torch.empty_like(each, device="cpu") for name, each in self.tensors.items()}
        return make_trainee(recipe, self.folder, self.spec, transformer, self.lift, tensors, sketch=True)

    def batch(self, recipe: Recipe, config: Mapping[str, Any], size: tuple[int, int], side: int) -> Batch:
        """A batch of noise in the shapes of a run's own.

        Args:
            config: of the transformer.
            size: height and width of the images.
            side: pixels along a token.
        """
        generator = torch.Generator().manual_seed(0)
        count, (height, width) = recipe.batch_size, size
        patch = self.lift.latent_patch if self.lift is not None else self.spec.latent_patch(config)
        rank = self.lift.rank if self.lift is not None else self.spec.token_size(config)
        grid = rank // patch**2, height // side * patch, width // side * patch

        def images(*lead: int) -> Tensor:
            return torch.randint(256, (*lead, 3, height, width), generator=generator, dtype=torch.uint8)

        def latents(*lead: int) -> Tensor:
            return torch.randn((*lead, *grid), generator=generator)

        prompts = _of_length(self.spec.conditioning(config, count, generator), self.text)
        shown = (count, self.references)
        return Batch(
            images(count),
            latents(count),
            prompts,
            [""] * count,
            [(0, 0)] * count,
            images(*shown) if self.references else None,
            latents(*shown) if self.references else None,
        )


class _Recent(dict[Any, Any]):
    """The last few fake tensors that were made of real ones. The mode's own table refers to all of them weakly, and what anything
    refers to weakly cannot change its dtype in place."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """Keep one, and forget the oldest of many."""
        if len(self) >= 8:
            del self[next(iter(self))]
        super().__setitem__(key, value)


INTEGERS = (torch.bool, torch.int32, torch.int64)
"""Of masks, positions and lengths, whose values decide shapes; images and quantized weights are others."""


class _WithoutMemory(FakeTensorMode):
    """The mode of tensors without memory. Those that are made of integers alone keep their values."""

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Sequence[Any] = (), named: Mapping[str, Any] = MappingProxyType({})
    ) -> Any:
        """Run one operation: one of integers as it is, and any other without memory."""
        given = [each for each in tree_iter((arguments, dict(named))) if isinstance(each, Tensor)]
        if given:
            real = all(each.dtype in INTEGERS and not isinstance(each, FakeTensor) for each in given)
        else:
            real = named.get("dtype") in INTEGERS
        if real:
            return function(*arguments, **named)
        if function in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default):
            arguments = (arguments[0], _numbers(arguments[1]), *arguments[2:])
        return super().__torch_dispatch__(function, types, arguments, named)


def _numbers(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Indices, in which masks that have values are replaced by the positions that they let through."""
    found: list[Tensor | None] = []
    for each in indices:
        masks = each is not None and each.dtype == torch.bool and not isinstance(each, FakeTensor)
        found += each.nonzero().unbind(1) if each is not None and masks else [each]
    return found


@contextmanager
def without_memory(gpu: bool = False) -> Iterator[None]:
    """Within it new tensors have no memory, and operations on them cost nothing.

    Args:
        gpu: whether norms keep what those of a GPU keep, which are one kernel where a processor has ten.
    """
    mode = _WithoutMemory(allow_non_fake_inputs=True)
    mode.fake_tensor_converter.meta_converter.tensor_memo = _Recent()  # type: ignore[assignment]
    # Copies of tensors are of the same mode.
    mode.__deepcopy__ = lambda memo: mode  # type: ignore[attr-defined]
    try:
        with warnings.catch_warnings(), mode, patch.object(F, "rms_norm", fused_rms_norm) if gpu else nullcontext():
            # Copying a tensor asks where it lies; that it lies nowhere is the point.
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
            yield
    finally:
        # What they keep must not be without memory for those who come after.
        for kept in (constant, dct_matrix, positions, rotations):
            kept.cache_clear()


def placed(model: Any) -> Any:
    """A module from the meta device, within :func:`without_memory` with tensors of the processor."""
    for module in model.modules():
        for name, each in module._parameters.items():
            if each is not None:
                module._parameters[name] = nn.Parameter(torch.empty_like(each, device="cpu"), requires_grad=False)
        for name, each in module._buffers.items():
            if each is not None and each.is_meta:
                module._buffers[name] = torch.empty_like(each, device="cpu")
    return model


def text_tokens(folder: ModelFolder) -> int:
    """Tokens of a prompt: as many as its tokenizer or its stock pipeline takes."""
    import diffusers

    kind = getattr(diffusers, str(folder.index.get("_class_name")), None)
    known = inspect.signature(kind.__call__).parameters if kind is not None else {}
    default = known["max_sequence_length"].default if "max_sequence_length" in known else LONG_PROMPT
    return min(filter(None, (folder.text_length(), default if isinstance(default, int) else LONG_PROMPT)))


def text_tokens_of_pictures(folder: ModelFolder, spec: Architecture, shown: Collection[tuple[Size, int]]) -> int:
    """Tokens that reference images add to a prompt, at most, where a folder's text encoder reads them together with it; else none.

    Args:
        shown: sizes of images, and how many references of that size each one has.
    """
    at = spec.shown_beside
    if at is None or not read_together(folder, spec) or folder.class_of("processor") is None:
        return 0
    processor, name = (
        load_transformers(folder.path / "processor", "Qwen2VLImageProcessor"),
        str(folder.index["_class_name"]),
    )

    def tokens(size: Size) -> int:
        patches: int = processor.get_number_of_image_patches(*at(name, *size))
        return patches // processor.merge_size**2

    return max(count * tokens(size) for size, count in shown)


def _of_length(prompts: dict[str, Tensor], text: int) -> dict[str, Tensor]:
    """Conditioning with another number of tokens: its second axis, where a tensor has a third, and that of their masks."""
    lengths = {each.shape[1] for each in prompts.values() if each.ndim > 2}

    def stretched(each: Tensor) -> Tensor:
        if each.ndim < 2 or each.shape[1] not in lengths:
            return each
        repeats = -(-text // each.shape[1])
        return torch.cat([each] * repeats, 1)[:, :text].contiguous()

    return {name: stretched(each) for name, each in prompts.items()}
