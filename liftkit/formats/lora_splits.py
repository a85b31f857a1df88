"""LoRAs of a fused matrix that are one for each group of its rows, as of query, key and value: ``lora_down.0``, ``lora_up.0``,
``lora_down.1``, ... under one name, with one alpha. sd-scripts trains FLUX.1 so with ``split_qkv``."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from liftkit.checkpoint.contents import ALPHA, part_of
from liftkit.checkpoint.header import shown
from liftkit.errors import UsageError

_SPLIT = re.compile(r"(.+)\.lora_(down|up)\.([0-9]{1,3})\.weight", re.DOTALL)


def joined(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same changes with one pair for each matrix: the A of all groups below one another, and the B of each in rows and columns
    of its own. A strength of alpha over a group's rank is one over the rank of all, of an alpha as many times as large.

    Args:
        tensors: of a LoRA file, by name; those of other kinds stay as they are.

    Raises:
        UsageError: if a group is not complete, or has another rank than others.
    """
    groups: dict[str, dict[str, dict[int, str]]] = {}
    for key in tensors:
        match = _SPLIT.fullmatch(key)
        if match is not None:
            groups.setdefault(match[1], {"down": {}, "up": {}})[match[2]][int(match[3])] = key
    result = dict(tensors)
    alphas = {part.stem: key for key in tensors if (part := part_of(key)) is not None and part.name == ALPHA}
    for stem, sides in groups.items():
        if len(sides["down"]) < 2 and len(sides["up"]) < 2:
            continue  # the number is an adapter's name
        downs, ups = (_in_order(stem, tensors, sides, side) for side in ("down", "up"))
        for key in (*sides["down"].values(), *sides["up"].values()):
            del result[key]
        result[f"{stem}.lora_down.weight"] = torch.cat(downs)
        result[f"{stem}.lora_up.weight"] = torch.block_diag(*ups)
        if stem in alphas:
            result[alphas[stem]] = tensors[alphas[stem]].float() * len(downs)
    return result


def _in_order(stem: str, tensors: Mapping[str, Tensor], sides: dict[str, dict[int, str]], side: str) -> list[Tensor]:
    """The matrices of one side, all of one rank and as wide as they have to be."""
    numbers = sorted(sides["down"])
    where = f"module {shown(stem)}"
    if numbers != sorted(sides["up"]) or numbers != list(range(len(numbers))):
        found = " and ".join(f"lora_{name} {', '.join(map(str, sorted(sides[name])))}" for name in sides)
        raise UsageError(f"{where}: has groups {found}; each needs both, from 0 on; is the file complete?")
    found_here = [tensors[sides[side][number]] for number in numbers]
    rank = tensors[sides["down"][0]].shape[:1]
    for number, matrix in zip(numbers, found_here):
        own = matrix.shape[:1] if side == "down" else matrix.shape[1:]
        if matrix.ndim != 2 or own != rank or (side == "down" and matrix.shape != found_here[0].shape):
            raise UsageError(
                f"{where}: lora_{side}.{number} is of shape {tuple(matrix.shape)}, which does not go with "
                f"lora_down.0, {tuple(tensors[sides['down'][0]].shape)}"
            )
    return found_here
