"""What is allocated while something runs, tensor by tensor and by part; for tensors without memory as for real ones."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

ACTIVATIONS, WORKING = "activations", "working space"
_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_BACK = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
COUNTS = {
    **flop_registry,
    _ATTENTION: lambda q, k, v, *_, **__: sdpa_flop_count(q.shape, k.shape, v.shape),
    _BACK: lambda gradient, q, k, v, *_, **__: sdpa_backward_flop_count(gradient.shape, q.shape, k.shape, v.shape),
}
"""Floating-point operations by operator: torch's own table, and the processor's attention."""
HOST = "host memory"
"""Part of what is not on the device: no part of the sum."""


class Allocations(TorchDispatchMode):
    """A mode in which every new storage is counted from its first tensor to its last, as part of something.

    What is computed with gradients is an activation (also what gradient checkpointing computes again), anything else, such as
    gradients on their way, is working space; within :meth:`part` it is what that says. The peak is that of the sum.

    Args:
        live: bytes by part, now.
        peak: bytes by part, when their sum was the largest.
        operations: floating-point operations of matrix products, convolutions and attention so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: Counter[str] = Counter()
        self.peak: dict[str, int] = {}
        self.operations = 0.0
        self._most = self._total = 0
        self._named: str | None = None
        self._parts: dict[int, tuple[str, int]] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), named: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation, and count what it returns."""
        result = function(*arguments, **(named or {}))
        count = COUNTS.get(function._overloadpacket)
        if count is not None:
            self.operations += count(*arguments, **(named or {}), out_val=result)
        part = self._named or (ACTIVATIONS if torch.is_grad_enabled() else WORKING)
        for each in tree_iter(result):
            if isinstance(each, Tensor):
                self._count(each, part)
        return result

    def _count(self, tensor: Tensor, part: str) -> None:
        if tensor.is_meta:
            return  # Nowhere, in a sketch as in a run.
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._parts or not size:
            return
        self._parts[key] = (part, size)
        weakref.finalize(storage, self._forget, key).atexit = False
        self._add(part, size)

    def _forget(self, key: int) -> None:
        part, size = self._parts.pop(key)
        self._add(part, -size)

    def _add(self, part: str, size: int) -> None:
        self.live[part] += size
        self._total += size if part != HOST else 0
        if self._total > self._most:
            self._most, self.peak = self._total, dict(self.live)

    def assign(self, part: str, tensors: Iterable[Tensor]) -> None:
        """Count tensors that are there as a part, whatever they were made in."""
        for tensor in tensors:
            self._count(tensor, part)
            key = tensor.untyped_storage()._cdata
            before, size = self._parts.get(key, (part, 0))
            self._parts[key] = (part, size)
            self._add(before, -size)
            self._add(part, size)

    def forget_peak(self) -> None:
        """Begin to look for the peak again."""
        self._most, self.peak = 0, {}
        self._add(WORKING, 0)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Within it, whatever is new is part of something."""
        before, self._named = self._named, name
        try:
            yield
        finally:
            self._named = before
