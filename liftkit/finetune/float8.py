"""The frozen reference's matrix products in eight bits: a third of a step's operations at up to twice the speed.

Numbers of float8 (e4m3) have three bits of mantissa and reach from 2^-9 to 448. A tensor is divided by one scale, which brings its
largest number to 448; what is small keeps its relative precision down to 1 / 28,672 of that. The matrices never change, and are
rounded once. Activations are rounded when they come. Products are summed with the device's fast accumulation, which on some GPUs
has fewer bits than float32. The student's products stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from liftkit.errors import UsageError
from liftkit.finetune.network import blocks_of

EIGHT = torch.float8_e4m3fn
LARGEST = torch.finfo(EIGHT).max
MULTIPLE = 16
"""Of which rows and columns of a matrix have to be, for the kernels."""


class Float8Linear(nn.Linear):
    """A frozen linear layer that has its matrix in float8 as well, for the products of the reference.

    Attributes:
        in_float8: whether products of tokens are in float8 now. One row for each image, as for modulations, stays as it is.
    """

    in_float8: bool = False
    float8: Tensor
    float8_scale: Tensor

    def forward(self, states: Tensor) -> Tensor:
        """``states`` (..., inputs) -> (..., outputs), in the same dtype either way."""
        return self.product(states) if self.in_float8 and states.ndim > 2 else super().forward(states)

    def product(self, states: Tensor) -> Tensor:
        """The product in float8."""
        kind = states.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype
        with torch.autocast(kind, enabled=False):
            rows, scale = rounded(states.reshape(-1, states.shape[-1]))
            half = dtype if dtype in (torch.bfloat16, torch.float16) else torch.bfloat16
            result = torch._scaled_mm(
                rows, self.float8.t(), scale, self.float8_scale, out_dtype=half, use_fast_accum=True
            )
            result = result.to(dtype).unflatten(0, states.shape[:-1])
            return result if self.bias is None else result + self.bias.to(dtype)


def rounded(values: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers in float8, shaped like ``values``, and the scale that they are to be multiplied by, () in float32."""
    least, most = torch.aminmax(values)
    largest = torch.maximum(most, -least).float()
    # No smaller than a number whose reciprocal float16 has too; of nothing but zeros any scale will do.
    factor = (largest / LARGEST).clamp_min(torch.finfo(values.dtype).tiny).reciprocal().to(values.dtype)
    return (values * factor).to(EIGHT), factor.float().reciprocal()


@torch.no_grad()
def give_float8(transformer: Any) -> list[nn.Linear]:
    """Let the frozen linear layers of a transformer's blocks have their matrices in float8 as well, in place.

    Args:
        transformer: with its adapters; its frozen weights are final.

    Returns:
        The layers. Those with sides that the kernels do not take are left as they are.

    Raises:
        UsageError: if there are none.
    """
    frozen = [
        layer
        for block in blocks_of(transformer)
        for layer in block.modules()
        if type(layer) is nn.Linear
        and not layer.weight.requires_grad
        and not any(n % MULTIPLE for n in layer.weight.shape)
    ]
    if not frozen:
        raise UsageError(
            "objective.reference_precision: float8: the transformer's blocks have no frozen matrix whose sides are multiples of "
            f"{MULTIPLE}; set it to same"
        )
    for layer in frozen:
        # The layer itself, which others hold on to and find by its class.
        layer.__class__ = Float8Linear
        eight, scale = rounded(layer.weight)
        layer.register_buffer("float8", eight, persistent=False)
        layer.register_buffer("float8_scale", scale, persistent=False)
    return frozen


def check_float8(device: torch.device) -> None:
    """Raise unless a device multiplies in float8. A processor does, though not sooner, from torch 2.7 on.

    Raises:
        UsageError: saying what it lacks.
    """
    key = "objective.reference_precision: float8"
    if device.type == "cpu":
        try:
            (eight, scale), other = rounded(torch.zeros(MULTIPLE, MULTIPLE)), torch.ones(())
            torch._scaled_mm(eight, eight.t(), scale, other, out_dtype=torch.bfloat16)
        except NotImplementedError as error:
            raise UsageError(
                f"{key}: torch {torch.__version__} has no such products on a processor; install torch >= 2.7, or set it to same"
            ) from error
    elif device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        raise UsageError(
            f"{key}: {name} has no products in float8, which need a GPU of compute capability 8.9 (RTX 40, L40, H100) or later; "
            "set it to same"
        )
