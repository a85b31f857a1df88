"""What a sketch of a run has in the places of what is quantized or downloaded: the same shapes, no values."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liftkit.finetune.adversary import Adversary

BLOCK = 64
"""Numbers in a block of nf4."""
VGG = ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3)
"""Channels of VGG-16's convolutions, in the five stages that LPIPS compares."""


class _Product(torch.autograd.Function):
    """A product with a matrix that is made from its bits each time, in the backward pass too."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, rows: int) -> Tensor:
        ctx.columns = states.shape[-1]
        return states @ states.new_empty(ctx.columns, rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return gradient @ gradient.new_empty(gradient.shape[-1], ctx.columns), None


class QuantizedLinear(nn.Linear):
    """As large as a quantized matrix, and it allocates what that does.

    Args:
        old: whose place it takes.
        kind: ``int8`` or ``nf4``.
    """

    def __init__(self, old: nn.Linear, kind: str) -> None:
        super().__init__(old.in_features, old.out_features, bias=False, device="meta")
        del self.weight
        numbers = old.weight.numel()
        if kind == "int8":
            bits, scales = torch.empty(numbers, dtype=torch.int8), old.weight.new_empty(2 * old.out_features)
        else:
            bits, scales = (
                torch.empty(numbers // 2, dtype=torch.uint8),
                torch.empty(numbers // BLOCK, dtype=torch.uint8),
            )
        self.register_buffer("bits", bits)
        self.register_buffer("scales", scales)
        self.bias = old.bias

    def forward(self, states: Tensor) -> Tensor:
        """(..., columns) to (..., rows)."""
        result: Tensor = _Product.apply(states, self.out_features)
        return result if self.bias is None else result + self.bias


def quantized(transformer: nn.Module, kind: str, paths: list[str]) -> None:
    """Exchange matrices for what stands for them quantized."""
    for path in paths:
        parent, _, name = path.rpartition(".")
        old = transformer.get_submodule(path)
        assert isinstance(old, nn.Linear)
        setattr(transformer.get_submodule(parent), name, QuantizedLinear(old, kind))


class _Norm(torch.autograd.Function):
    """A norm over the last axis that keeps its input and one number of each row."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(states, states.new_empty(states.shape[:-1], dtype=torch.float32))
        ctx.weight = weight
        return torch.empty_like(states)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, Tensor | None]:
        states = ctx.saved_tensors[0]
        learns = ctx.weight is not None and ctx.weight.requires_grad
        return torch.empty_like(states), torch.empty_like(ctx.weight) if learns else None


def fused_rms_norm(states: Tensor, _: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:  # noqa: ARG001
    """What ``torch.nn.functional.rms_norm`` is on a GPU, of one kernel."""
    result: Tensor = _Norm.apply(states, weight) if torch.is_grad_enabled() else torch.empty_like(states)
    return result


class LpipsShaped:
    """LPIPS on VGG-16, spatial, without its weights."""

    def __init__(self) -> None:
        widths = (3, *(stage[-1] for stage in VGG))
        self.stages = [
            [nn.Conv2d(*pair, 3, padding=1).requires_grad_(False) for pair in zip((before, *stage), stage)]
            for before, stage in zip(widths, VGG)
        ]

    def __call__(self, images: Tensor, target: Tensor) -> Tensor:
        """See :data:`liftkit.finetune.objective.Perceptual`."""
        with torch.autocast(images.device.type, torch.bfloat16):
            size, total = images.shape[-2:], images.new_zeros(len(images), 1, *images.shape[-2:])
            for found, wanted in zip(self._features(images), self._features(target)):
                distance = (F.normalize(found) - F.normalize(wanted)).square().mean(1, keepdim=True)
                total = total + F.interpolate(distance, size=size, mode="bilinear", align_corners=False)
            return total.float()

    def _features(self, images: Tensor) -> list[Tensor]:
        found, states = [], images
        for number, stage in enumerate(self.stages):
            states = F.max_pool2d(states, 2) if number else states
            for layer in stage:
                states = F.relu_(layer(states))
            found.append(states)
        return found


class JudgesAll:
    """An adversary that looks at every image, where a run's looks at those of little noise."""

    def __init__(self, adversary: Adversary) -> None:
        self.optimizer, self._judge = adversary.optimizer, adversary.judge

    def __call__(self, real: Tensor, fake: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`Adversary.__call__`."""
        return self._judge(real, fake, torch.ones_like(sigma).mean())
