"""A frozen base in eight or four bits: student and reference share it, and what learns beside it keeps its precision.

A matrix is rounded to 127 steps of each row's largest number (int8, torchao), or to 16 levels of each 64 numbers' largest
(nf4, bitsandbytes). Products are of the activations with the matrix in the activations' dtype, made anew each time.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liftkit.errors import UsageError
from liftkit.finetune.stand_ins import quantized

SMALLEST = 4096
"""Numbers in a matrix from which on it is quantized: what is smaller holds next to no memory."""


def quantize_base(transformer: nn.Module, kind: str, keep: Iterable[str], *, sketch: bool = False) -> list[str]:
    """Quantize the frozen matrices of a transformer, in place.

    Args:
        transformer: with its adapters; only what learns asks for gradients.
        kind: ``int8`` or ``nf4``.
        keep: paths of modules that stay as they are, with all that is in them.
        sketch: put in their places what is as large; no package is asked for.

    Returns:
        The paths of what was quantized.

    Raises:
        UsageError: if the package is not installed, or nothing is there to quantize.
    """
    kept = tuple(keep)
    paths = [
        path
        for path, module in transformer.named_modules()
        if type(module) is nn.Linear
        and not module.weight.requires_grad
        and module.weight.numel() >= SMALLEST
        and not any(path == each or path.startswith(f"{each}.") for each in kept)
    ]
    if not paths:
        raise UsageError(f"base.quantize: {kind}: the transformer has no frozen matrix of {SMALLEST} numbers or more")
    if sketch:
        quantized(transformer, kind, paths)
    else:
        {"int8": _int8, "nf4": _nf4}[kind](transformer, paths)
    return paths


def check_quantize(kind: str) -> None:
    """Raise unless the package that quantizes so is there.

    Raises:
        UsageError: naming it.
    """
    package = {"int8": "torchao", "nf4": "bitsandbytes"}.get(kind)
    if package is not None and find_spec(package) is None:
        raise _missing(kind, package)


def _int8(transformer: nn.Module, paths: list[str]) -> None:
    # It names each of its libraries that does not suit this torch.
    logging.getLogger("torchao").setLevel(logging.ERROR)
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise _missing("int8", "torchao") from error
    wanted = set(paths)
    quantize_(transformer, Int8WeightOnlyConfig(), filter_fn=lambda module, path: path in wanted)
    for path in paths:
        module = transformer.get_submodule(path)
        assert isinstance(module, nn.Linear)
        module.register_forward_pre_hook(_as_autocast)
        # On the module itself, which keeps the class that others look for.
        module.forward = partial(_product, module)  # type: ignore[method-assign]


class _Product(torch.autograd.Function):
    """A product with a frozen quantized matrix, which is made anew in the backward pass.

    torchao leaves it to autograd, which would keep each matrix in the activations' dtype until then: more than what was saved.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        return F.linear(states, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return gradient @ ctx.weight.dequantize().to(gradient.dtype), None


def _product(module: nn.Linear, states: Tensor) -> Tensor:
    result: Tensor = _Product.apply(states, module.weight)
    return result if module.bias is None else result + module.bias.to(result.dtype)


def _nf4(transformer: nn.Module, paths: list[str]) -> None:
    try:
        from bitsandbytes.nn import Linear4bit, Params4bit
    except ImportError as error:
        raise _missing("nf4", "bitsandbytes") from error
    for path in paths:
        parent, _, name = path.rpartition(".")
        old = transformer.get_submodule(path)
        new = Linear4bit(
            old.in_features,
            old.out_features,
            bias=old.bias is not None,
            compute_dtype=old.weight.dtype,
            quant_type="nf4",
            device="meta",
        )
        # It quantizes when it is moved, to wherever it is.
        device = old.weight.device
        new.weight = Params4bit(old.weight.data, requires_grad=False, quant_type="nf4", module=new).to(device)
        new.bias = old.bias
        new.register_forward_pre_hook(_as_autocast)
        setattr(transformer.get_submodule(parent), name, new)


def _as_autocast(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Autocast knows no quantized products: their operands are cast here as it would."""
    (states, *rest) = arguments
    kind = states.device.type
    if torch.is_autocast_enabled(kind) and states.is_floating_point():
        states = states.to(torch.get_autocast_dtype(kind))
    return (states, *rest)


def _missing(kind: str, package: str) -> UsageError:
    return UsageError(f"base.quantize: {kind}: {package} is not installed; pip install {package}, or take none")
