"""Adapters of several generations: what a folder learned before, so that the next adapter is for the same latent base.

A folder with an adapter merged in keeps that adapter's LoRA beside its weights, in :data:`MERGED`, and the names of what was
trained in full. ``W + B1 A1 + B2 A2`` is one LoRA of the ranks' sum, so that an adapter learned on such a folder is written with
both, exactly, and works on the latent base. Where a folder keeps no such file (it was trained in full, or by an earlier version),
the adapter names the folder that it needs instead, by the digests of its transformer, and is refused on another.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from liftkit.checkpoint.files import read_safetensors, write_safetensors
from liftkit.checkpoint.hashing import TABLE
from liftkit.checkpoint.model import ModelFolder, Weights
from liftkit.checkpoint.record import read_record, transformer_digests
from liftkit.errors import UsageError
from liftkit.models.adapter import LORA_A, LORA_B, WEIGHT, Adapter

MERGED = "merged.safetensors"


@dataclass(frozen=True)
class History:
    """What was merged into a folder since its conversion.

    Args:
        lora: pairs by name, their strength in B.
        full: names of tensors that were replaced.
    """

    lora: dict[str, Tensor] = field(default_factory=dict)
    full: frozenset[str] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.lora or self.full)

    def then(self, adapter: Adapter) -> History:
        """This and an adapter learned upon it. What it replaced in full, or holds a LoRA beside, follows its own order:
        a full tensor ends the LoRA before it."""
        lora = {name: tensor for name, tensor in self.lora.items() if f"{_module(name)}{WEIGHT}" not in adapter.full}
        for module, (down, up) in adapter.pairs.items():
            strong = (adapter.factor(len(down)) * up.double()).to(up.dtype)
            a, b = f"{module}{LORA_A}", f"{module}{LORA_B}"
            lora[a] = _joined(lora[a], down, 0) if a in lora else down
            lora[b] = _joined(lora[b], strong, 1) if b in lora else strong
        return History(lora, self.full | adapter.full.keys())

    def save(self, folder: Path) -> None:
        """Write it into a folder."""
        write_safetensors(folder / MERGED, self.lora, {"full": json.dumps(sorted(self.full))})


def history_of(folder: ModelFolder) -> History | None:
    """What was merged into a folder; None where that is not known."""
    path = folder.path / MERGED
    if path.is_file():
        tensors, metadata = read_safetensors(path)
        try:
            full = frozenset(map(str, json.loads(metadata["full"])))
        except (KeyError, ValueError, TypeError) as error:
            raise UsageError(
                f"{path}: no names of what was trained in full ({error}); finetune or import again"
            ) from error
        return History(tensors, full)
    return None if "finetune" in read_record(folder.path) else History()


def for_latent_base(adapter: Adapter, folder: ModelFolder) -> Adapter:
    """An adapter learned upon a folder as one for the latent model that the folder came from; else it names the folder.

    Args:
        adapter: what was learned, alone.
        folder: that it was learned upon.
    """
    history = history_of(folder)
    if history is None:
        needs = {"name": folder.name, TABLE: transformer_digests(folder.path)}
        return replace(adapter, base=folder.name, provenance={**adapter.provenance, "needs": needs})
    if not history:
        return adapter
    weights = folder.weights("transformer")
    kept = {name: _read(weights, name) for name in sorted(history.full - adapter.full.keys())}
    # A LoRA beside a tensor that was replaced is in that tensor already.
    earlier = {name: each for name, each in history.lora.items() if f"{_module(name)}{WEIGHT}" not in history.full}
    stacked = History(earlier).then(adapter).lora
    return replace(adapter, tensors={**kept, **adapter.full, **stacked}, alpha=None)


def _module(name: str) -> str:
    return name.removesuffix(LORA_A).removesuffix(LORA_B)


def _joined(first: Tensor, second: Tensor, dim: int) -> Tensor:
    wide = torch.promote_types(first.dtype, second.dtype)
    return torch.cat([first.to(wide), second.to(wide)], dim=dim)


def _read(weights: Weights, name: str) -> Tensor:
    tensor = weights.read(name)
    if tensor is None:
        raise UsageError(f"tensor {name!r}, which was trained in full, is no longer there; is the model complete?")
    return tensor
