"""Weights at addresses where another CPU's libraries take other kernels: what a file mapped into memory may do to a model.

A tensor that torch allocates begins at a multiple of 64 bytes. One that is mapped from a file begins where the file's
header ends, and matrix libraries may choose another kernel for it, which adds in another order. Here every weight and
buffer moves to such an address before it is used, so that one machine can stand in for others.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

LATE = 4
"""Bytes behind a multiple of 64 at which a moved tensor begins; one element, where that is wider."""


def misaligned(tensor: Tensor) -> Tensor:
    """A copy that begins :data:`LATE` bytes behind a multiple of 64."""
    skipped = max(1, LATE // tensor.element_size())
    room = torch.empty(skipped + tensor.numel(), dtype=tensor.dtype)
    return room[skipped:].view(tensor.shape).copy_(tensor)


def misalign_weights() -> Any:
    """From now on, move a module's parameters and buffers before its forward, wherever they are aligned; a handle that ends it."""
    return nn.modules.module.register_module_forward_pre_hook(_move)


def liftkit_command(misaligned: bool) -> list[str]:
    """The command line as a process of its own, which may move its weights as well; run it in the repository's root."""
    if not misaligned:
        return [sys.executable, "-m", "liftkit"]
    return [sys.executable, "-c", "import tests.alignment as a, liftkit.cli.app as b; a.misalign_weights(); b.run()"]


def _move(module: nn.Module, _: Any) -> None:
    if torch.compiler.is_compiling():
        return
    for tensor in (*module._parameters.values(), *module._buffers.values()):
        if tensor is not None and tensor.device.type == "cpu" and tensor.numel() and tensor.data_ptr() % 16 == 0:
            tensor.data = misaligned(tensor.data)
