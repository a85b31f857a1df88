"""How a family makes the forward arguments of prompts and labels, and random ones for proofs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from liftkit.models.spec import Config


def randn(generator: torch.Generator, *shape: int) -> Tensor:
    """Standard normal numbers on the CPU, for random conditioning."""
    return torch.randn(shape, generator=generator)


def random(**shapes: tuple[int | str, ...]) -> Callable[[Config, int, torch.Generator], dict[str, Any]]:
    """``conditioning`` of normal numbers (B, ...), of ones where the name ends in ``mask``; sizes may be config entries."""

    def draw(config: Config, batch: int, generator: torch.Generator) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for name, shape in shapes.items():
            sizes = [config[each] if isinstance(each, str) else each for each in shape]
            ones = torch.ones(batch, *sizes, dtype=torch.bool)
            result[name] = ones if name.endswith("mask") else randn(generator, batch, *sizes)
        return result

    return draw


def encoded(*names: str | None, **more: Any) -> Callable[[Any, list[str], int | None], dict[str, Tensor]]:
    """``prompts`` by the stock ``encode_prompt``, whose results are named by position; None leaves one out.

    Args:
        names: of the results.
        more: further arguments of ``encode_prompt``.
    """

    def prompts(pipeline: Any, texts: list[str], length: int | None) -> dict[str, Tensor]:
        asked = {} if length is None else {"max_sequence_length": length}
        found = pipeline.encode_prompt(texts, device=pipeline._execution_device, **more, **asked)
        found = (found,) if isinstance(found, Tensor) else found
        return {name: value for name, value in zip(names, found) if name is not None}

    return prompts


def one_hot(name: str, size: str, **more: bool) -> Callable[[Config, Tensor], dict[str, Tensor]]:
    """``labels`` of an architecture that reads text: one token with a 1 in the place of the label.

    Args:
        name: of the argument that holds the text.
        size: config entry with the numbers of a token, one for each class and one for none.
        more: masks, by name.
    """

    def read(config: Config, labels: Tensor) -> dict[str, Tensor]:
        text = F.one_hot(labels, config[size]).float()[:, None]
        return {name: text, **{mask: torch.full_like(text[:, :, 0], on, dtype=torch.bool) for mask, on in more.items()}}

    return read


def padded(rows: Sequence[Tensor], length: int) -> tuple[Tensor, Tensor]:
    """Rows (L_i, d) of text as one (B, length, d), zeros behind, with a mask (B, length)."""
    mask = torch.stack([torch.arange(length) < len(row) for row in rows]).to(rows[0].device)
    return torch.stack([F.pad(row, (0, 0, 0, length - len(row))) for row in rows]), mask


def trimmed(text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Text (B, L, d) and its mask (B, L) without the columns behind that are padding in every row; the inverse of
    :func:`padded` for networks that attend to padding, or count it in their positions."""
    longest = max(int(mask.sum(1).max()), 1)
    return text[:, :longest], mask[:, :longest]
