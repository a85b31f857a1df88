"""Adapters: what a finetune learned, alone. Projections, output norm, the lift, LoRA and a detail head; megabytes beside gigabytes.

A folder of ``adapter.safetensors`` (modules trained in full under their own names, ``<module>.lora_A.weight`` and
``<module>.lora_B.weight`` for the rest), ``lift.safetensors``, ``liftkit.json`` and a card. It applies to the latent model
that it came from, which becomes a pixel model in memory, or to any conversion of that with the same lift.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from liftkit.checkpoint.files import expanded, read_safetensors, write_safetensors, write_text
from liftkit.checkpoint.folder import RECORD, atomic_folder
from liftkit.checkpoint.hashing import TABLE
from liftkit.checkpoint.record import read_record, write_record
from liftkit.errors import UsageError
from liftkit.lift import Lift
from liftkit.models.detail_head import head_shape, in_head

FORMAT, VERSION = "liftkit.adapter", 1
TENSORS, LIFT = "adapter.safetensors", "lift.safetensors"
MOST_ALPHA = 1e6
LORA_A, LORA_B, WEIGHT = ".lora_A.weight", ".lora_B.weight", ".weight"


@dataclass(frozen=True, eq=False)
class Adapter:
    """What was learned.

    Args:
        tensors: full tensors by their names in the transformer, and LoRA pairs.
        alpha: of the LoRA: a pair adds ``alpha / rank * B A`` to its module's weight; None is every pair's own rank.
        lift: A and s; None where a latent model was continued.
        transformer: class name of the transformer that it applies to, the stock one for a latent model.
        base: name of the latent model that it came from.
        provenance: plain data: recipe, versions, steps.

    Raises:
        UsageError: if half of a LoRA pair is missing, or its halves disagree.
    """

    tensors: dict[str, Tensor]
    alpha: float | None
    lift: Lift | None
    transformer: str
    base: str
    provenance: dict[str, Any]

    def __post_init__(self) -> None:
        for name, tensor in self.tensors.items():
            if not name.endswith((LORA_A, LORA_B)):
                continue
            here, there = (LORA_A, LORA_B) if name.endswith(LORA_A) else (LORA_B, LORA_A)
            other = self.tensors.get(f"{name.removesuffix(here)}{there}")
            if other is None:
                raise UsageError(f"adapter: tensor {name!r} has no {there[1:]} beside it; is the file complete?")
            if tensor.ndim != 2 or other.ndim != 2 or tensor.shape[here == LORA_B] != other.shape[there == LORA_B]:
                raise UsageError(
                    f"adapter: tensor {name!r} of shape {tuple(tensor.shape)} does not go with its {there[1:]}, "
                    f"{tuple(other.shape)}"
                )

    @property
    def full(self) -> dict[str, Tensor]:
        """Tensors that were trained in full, by name."""
        return {name: tensor for name, tensor in self.tensors.items() if not name.endswith((LORA_A, LORA_B))}

    @property
    def pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """LoRA pairs A (rank, in) and B (out, rank), by module."""
        modules = [name.removesuffix(LORA_A) for name in self.tensors if name.endswith(LORA_A)]
        return {module: (self.tensors[f"{module}{LORA_A}"], self.tensors[f"{module}{LORA_B}"]) for module in modules}

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names of the transformer's tensors that it changes, with the shapes that they have to have."""
        products = {f"{module}{WEIGHT}": (up.shape[0], down.shape[1]) for module, (down, up) in self.pairs.items()}
        return products | {name: tuple(tensor.shape) for name, tensor in self.full.items()}

    @property
    def head(self) -> dict[str, int] | None:
        """Channels and depth of the detail head that it holds; None where it holds none.

        Raises:
            UsageError: if some of its tensors are missing.
        """
        return head_shape({name: tuple(tensor.shape) for name, tensor in self.full.items()})

    def added(self, there: Container[str]) -> dict[str, Tensor]:
        """The tensors that a transformer with tensors of these names gets beside its own: those of a detail head, if it has none.

        Raises:
            UsageError: if some of them are missing.
        """
        new = {name: tensor for name, tensor in self.full.items() if in_head(name) and name not in there}
        return new if self.head is not None and len(new) == sum(map(in_head, self.full)) else {}

    def factor(self, rank: int) -> float:
        """What a LoRA product of a rank is multiplied by."""
        return 1.0 if self.alpha is None else self.alpha / rank

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise unless it fits a transformer.

        Args:
            shapes: of the transformer's tensors, by name. It may be without the adapter's detail head.

        Raises:
            UsageError: naming the tensor that does not.
        """
        for name in self.shapes.keys() - self.added(shapes).keys():
            self._check_one(name, shapes.get(name))

    def _check_one(self, name: str, found: tuple[int, ...] | None) -> None:
        wanted = self.shapes[name]
        if found is None or tuple(found) != wanted:
            what = "has none of that name" if found is None else f"has {tuple(found)}"
            raise UsageError(f"adapter: tensor {name!r} is for {wanted}, the base {what}; is it the right base?")

    def apply_to(self, name: str, base: Tensor) -> Tensor:
        """One tensor of the transformer with what was learned, computed in float32 at least and rounded once to the
        base's dtype, on its device."""
        value, module = self.tensors.get(name, base), name.removesuffix(WEIGHT)
        if f"{module}{LORA_A}" in self.tensors:
            wide = torch.promote_types(base.dtype, torch.float32)
            down, up = (self.tensors[f"{module}{half}"].to(base.device, wide) for half in (LORA_A, LORA_B))
            value = value.to(base.device, wide) + self.factor(len(down)) * (up @ down)
        return value.to(base)

    def save(self, folder: Path, card: str, *, overwrite: bool = False) -> None:
        """Write the folder; it appears whole or not at all."""
        with atomic_folder(folder, overwrite=overwrite) as building:
            write_safetensors(building / TENSORS, self.tensors, {"format": "pt", "alpha": str(self.alpha)})
            if self.lift is not None:
                self.lift.save(building / LIFT)
            write_text(building / "README.md", card)
            record = {
                "format": FORMAT,
                "version": VERSION,
                "transformer": self.transformer,
                "base": self.base,
                "alpha": self.alpha,
                **self.provenance,
            }
            write_record(building, record)

    @classmethod
    def load(cls, folder: str | Path) -> Adapter:
        """Read what :meth:`save` wrote.

        Raises:
            UsageError: if it is no adapter folder of ours.
        """
        place = expanded(folder)
        record = _record(place)
        if record is None:
            raise UsageError(
                f"{folder}: no adapter ({RECORD} with format {FORMAT}); liftkit finetune with save: adapter makes one"
            )
        lift = Lift.load(place / LIFT) if (place / LIFT).is_file() else None
        tensors, _ = read_safetensors(place / TENSORS)
        known = ("transformer", "base", "alpha", "format", "version", TABLE)
        provenance = {key: value for key, value in record.items() if key not in known}
        alpha, names = record.get("alpha"), [record.get("transformer"), record.get("base")]
        if alpha is not None and not (type(alpha) in (int, float) and 0 < alpha < MOST_ALPHA):
            raise UsageError(f"{place / RECORD}: alpha is {alpha}, expected a number above 0, or null")
        if not all(isinstance(name, str) for name in names):
            raise UsageError(f"{place / RECORD}: transformer and base are {names}, expected two names")
        check_numbers(place / TENSORS, tensors)
        try:
            return cls(tensors, None if alpha is None else float(alpha), lift, str(names[0]), str(names[1]), provenance)
        except UsageError as error:
            raise UsageError(f"{place}: {error}") from error


def check_numbers(where: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise unless tensors are floating-point numbers, all of them finite.

    Raises:
        UsageError: naming the file and the tensor.
    """
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise UsageError(f"{where}: tensor {name!r} is of {tensor.dtype}, expected floating-point numbers")
        if not tensor.float().isfinite().all():
            raise UsageError(f"{where}: tensor {name!r} holds NaN or infinite numbers; fetch the file again")


def compact(value: Tensor, stored: torch.dtype) -> Tensor:
    """A learned tensor as an adapter holds it, for a base that is stored in a dtype.

    Beside half precision it is float16 where its numbers allow that: eleven bits where bfloat16 has eight, for the same bytes.
    Where they do not (too large, or so small that more than a part in a thousand of the norm would be lost) it is float32.
    """
    if stored not in (torch.bfloat16, torch.float16):
        return value.to(stored)
    half = value.to(torch.float16)
    lost = (half.double() - value.double()).norm()
    return half if bool(half.isfinite().all()) and bool(lost <= 1e-3 * value.double().norm()) else value.float()


def is_adapter(folder: str | Path) -> bool:
    """Whether this is a folder of ours that holds an adapter."""
    return _record(expanded(folder)) is not None


def _record(folder: Path) -> dict[str, Any] | None:
    try:
        record = read_record(folder)
    except UsageError:
        return None
    return record if record.get("format") == FORMAT and record.get("version") == VERSION else None
