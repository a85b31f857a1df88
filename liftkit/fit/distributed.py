"""Many processes, one fit or one folder: each takes a part; moments are added by an all-reduce."""

from __future__ import annotations

import os

import torch

from liftkit.device import launched_on_cpu
from liftkit.fit.folds import FoldedMoments
from liftkit.fit.stream import Collection


class Processes:
    """The processes of an ``accelerate launch`` (or torchrun), or this one alone.

    Attributes:
        index, count: this process among all.
        main: whether this one writes the result.
    """

    def __init__(self) -> None:
        self.index, self.count = 0, 1
        if self.expected() > 1:
            from accelerate import PartialState

            state = PartialState(cpu=launched_on_cpu())
            self.index, self.count = state.process_index, state.num_processes
        self.main = self.index == 0

    @staticmethod
    def expected() -> int:
        """How many processes the launcher said there are."""
        return int(os.environ.get("WORLD_SIZE", "1"))

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            torch.distributed.barrier()

    def add(self, collection: Collection) -> Collection:
        """The sum of all processes' moments, the same in each."""
        if self.count == 1:
            return collection
        folds = {}
        for name, mine in collection.folds.items():
            tensors = mine.tensors()
            for tensor in tensors.values():
                self._sum(tensor)
            folds[name] = FoldedMoments.from_tensors(tensors)
        return Collection(folds, collection.done, collection.resumed)

    def _sum(self, tensor: torch.Tensor) -> None:
        """All-reduce in float64, on the device that the backend needs."""
        distributed = torch.distributed
        if distributed.get_backend() == "nccl":
            moved = tensor.cuda()
            distributed.all_reduce(moved)
            tensor.copy_(moved)
        else:
            distributed.all_reduce(tensor)
