"""A run without its weights: what a recipe trains, in tensors that have shapes and dtypes and no memory."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liftkit.checkpoint.files import read_safetensors
from liftkit.checkpoint.model import LONG_PROMPT, ModelFolder
from liftkit.color import constant
from liftkit.data.batch import Batch
from liftkit.finetune.bands import dct_matrix
from liftkit.finetune.recipe import Recipe
from liftkit.finetune.stand_ins import fused_rms_norm
from liftkit.finetune.trainee import COMPUTE, Trainee, check_space, make_trainee
from liftkit.lift import Lift
from liftkit.models.jit import positions, rotations
from liftkit.models.load import load_component
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
        text: tokens of a prompt.
    """

    folder: ModelFolder
    spec: Architecture
    load: Callable[[torch.dtype], Any]
    lift: Lift | None
    tensors: Mapping[str, Tensor]
    text: int = LONG_PROMPT

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

    def transformer(self, recipe: Recipe) -> Any:
        """That of a recipe, on the meta device."""
        return self.load(torch.float32 if recipe.trainable.mode == "full" else COMPUTE[recipe.precision])

    def trainee(self, recipe: Recipe, transformer: Any) -> Trainee:
        """What the recipe trains, within :func:`without_memory`.

        Raises:
            UsageError: if the recipe names modules that are not there.
        """
        placed(transformer)
        return make_trainee(recipe, self.folder, self.spec, transformer, self.lift, self.tensors, sketch=True)


class _Recent(dict[Any, Any]):
    """The last few fake tensors that were made of real ones. The mode's own table refers to all of them weakly, and what anything
    refers to weakly cannot change its dtype in place."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """Keep one, and forget the oldest of many."""
        if len(self) >= 8:
            del self[next(iter(self))]
        super().__setitem__(key, value)


@contextmanager
def without_memory(gpu: bool = False) -> Iterator[None]:
    """Within it new tensors have no memory, and operations on them cost nothing.

    Args:
        gpu: whether norms keep what those of a GPU keep, which are one kernel where a processor has ten.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode(allow_non_fake_inputs=True)
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


def random_batch(
    recipe: Recipe,
    spec: Architecture,
    config: Mapping[str, Any],
    lift: Lift | None,
    size: tuple[int, int],
    side: int,
    text: int,
) -> Batch:
    """A batch of noise in the shapes of a run's own.

    Args:
        spec, config: of the transformer.
        lift: A and s; None in latent space.
        size: height and width of the images.
        side: pixels along a token.
        text: tokens of a prompt.
    """
    generator = torch.Generator().manual_seed(0)
    count, (height, width) = recipe.batch_size, size
    images = torch.randint(256, (count, 3, height, width), generator=generator, dtype=torch.uint8)
    patch = lift.latent_patch if lift is not None else spec.latent_patch(config)
    rank = lift.rank if lift is not None else spec.token_size(config)
    latents = torch.randn((count, rank // patch**2, height // side * patch, width // side * patch), generator=generator)
    prompts = _of_length(spec.conditioning(config, count, generator), text)
    return Batch(images, latents, prompts, [""] * count, [(0, 0)] * count)


def _of_length(prompts: dict[str, Tensor], text: int) -> dict[str, Tensor]:
    """Conditioning with another number of tokens: its second axis, where a tensor has a third, and that of their masks."""
    lengths = {each.shape[1] for each in prompts.values() if each.ndim > 2}

    def stretched(each: Tensor) -> Tensor:
        if each.ndim < 2 or each.shape[1] not in lengths:
            return each
        repeats = -(-text // each.shape[1])
        return torch.cat([each] * repeats, 1)[:, :text].contiguous()

    return {name: stretched(each) for name, each in prompts.items()}
