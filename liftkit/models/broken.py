"""Which component of a pipeline gives numbers that are none, in words."""

from __future__ import annotations

from typing import Any

from torch import nn


def broken(pipeline: Any, component: str, what: str) -> str:
    """What is wrong with a pipeline whose numbers are not finite.

    Args:
        pipeline: of diffusers.
        component: that made them; its siblings (``text_encoder_2``) are looked at too.
        what: they are.
    """
    modules = {name: each for name, each in pipeline.components.items() if isinstance(each, nn.Module)}
    for name, module in modules.items():
        if name.startswith(component):
            tensor = first_not_finite(module)
            if tensor is not None:
                return f"{name}: {what} is not finite, for its tensor {tensor!r} holds NaN or infinity; download the model again"
    return (
        f"{component}: {what} is not finite, though all its weights are; use a wider dtype, or another size or guidance"
    )


def first_not_finite(module: nn.Module) -> str | None:
    """The first parameter or buffer that holds NaN or infinity."""
    for name, each in (*module.named_parameters(), *module.named_buffers()):
        tensor = each.to_local() if hasattr(each, "to_local") else each  # of a sharded one, what this process holds
        if (
            tensor.is_floating_point()
            and not hasattr(tensor, "__tensor_flatten__")  # quantized: whole numbers and scales
            and tensor.numel()
            and not all(bound.isfinite() for bound in tensor.detach().aminmax())
        ):
            return name
    return None
