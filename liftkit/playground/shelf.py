"""The models of a page: loaded when first used, and out of memory when others are chosen."""

from __future__ import annotations

import gc
from collections.abc import Collection, Sequence
from math import prod

from liftkit.checkpoint.components import read_component
from liftkit.checkpoint.rewrite import FLOATS
from liftkit.device import available_memory
from liftkit.errors import LiftkitError
from liftkit.evaluate.entries import Entry, labels
from liftkit.lift import Lift
from liftkit.models.loaded import Loaded
from liftkit.models.registry import architecture
from liftkit.playground.abilities import Abilities, abilities

ROOM = 1.1
"""Of memory beside the weights."""


class Shelf:
    """Models by what they are called.

    Args:
        entries: the models, found and checked.
        device: where they are loaded.
    """

    def __init__(self, entries: Sequence[Entry], device: str) -> None:
        self.device = device
        self.entries = dict(zip(labels(entries, []), entries))
        self.abilities = {label: abilities(entry) for label, entry in self.entries.items()}
        self._loaded: dict[str, Loaded] = {}

    @property
    def labels(self) -> list[str]:
        """What the models are called, in their order."""
        return list(self.entries)

    @property
    def loaded(self) -> list[str]:
        """The models in memory."""
        return list(self._loaded)

    def can(self, chosen: Sequence[str]) -> Abilities:
        """What any of some models can do, with the first one's own choices."""
        first, *others = (self.abilities[label] for label in chosen or self.labels[:1])
        for other in others:
            first = first.with_(other)
        return first

    def tie(self, label: str, chosen: Sequence[str]) -> tuple[str, Lift] | None:
        """The pixel model whose A carries the noise of pixels to that of a latent model, the first chosen one that fits."""
        for other in [*chosen, *self.labels]:
            lift = self.entries[other].lift
            if lift is not None and _space(self.entries[label]) == (_space(self.entries[other])[0], lift.rank):
                return other, lift
        return None

    def take(self, label: str, chosen: Collection[str]) -> Loaded:
        """A model in memory.

        Args:
            label: of the model.
            chosen: models that are used beside it. Others leave memory; these do where there is no room for all.

        Raises:
            LiftkitError: if it does not fit, with what it needs.
            UsageError: if it cannot be loaded.
        """
        for other in self.loaded:
            if other not in chosen:
                self.drop(other)
        if label not in self._loaded:
            needed = self.needs(label)
            for other in self.loaded:
                if needed > available_memory(self.device):
                    self.drop(other)
            there = available_memory(self.device)
            if needed > there:
                raise LiftkitError(
                    f"{label}: its weights need {needed / 1e9:.3g} GB on {self.device}, and {there / 1e9:.3g} GB are free; "
                    "end what else uses the memory, or give another --device"
                )
            self._loaded[label] = self.entries[label].load(self.device)
        return self._loaded[label]

    def drop(self, label: str) -> None:
        """Take a model out of memory."""
        self._loaded.pop(label, None)
        gc.collect()
        if self.device.startswith("cuda"):
            import torch

            torch.cuda.empty_cache()

    def needs(self, label: str) -> int:
        """Bytes that a model's weights take on the device: four a number on the CPU, two elsewhere."""
        folder = self.entries[label].folder
        weights = [read_component(folder, name).weights for name in folder.components]
        tensors = [
            tensor
            for each in weights
            if each is not None
            for header in each.headers.values()
            for tensor in header.tensors.values()
        ]
        each = 4 if self.device.startswith("cpu") else 2
        return round(ROOM * each * sum(prod(tensor.shape) for tensor in tensors if tensor.dtype in FLOATS))


def _space(entry: Entry) -> tuple[str, int]:
    """The stock class of a model, and the numbers of its raw tokens."""
    config = entry.folder.config("transformer")
    spec = architecture(config["_class_name"])
    return spec.name, spec.token_size(config)
