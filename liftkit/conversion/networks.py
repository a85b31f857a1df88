"""Networks that are made from nothing: the config of an architecture by size, patch, resolution and number of classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from liftkit.checkpoint.components import Component
from liftkit.lift import Space

Size = Literal["tiny", "S", "B", "L", "H"]
WIDTHS: dict[Size, tuple[int, int, int]] = {
    "tiny": (6, 3, 64),
    "S": (12, 6, 64),
    "B": (12, 12, 64),
    "L": (24, 16, 64),
    "H": (32, 16, 80),
}
"""Layers, heads, and numbers of a head."""


@dataclass(frozen=True)
class Shape:
    """What a network is for.

    Args:
        size: of :data:`WIDTHS`.
        patch: side of a token, in elements of the state: pixels, or latents.
        resolution: side of the images, in pixels.
        classes: how many.
        channels: of the state: 3 colors, or those of latents.
        factor: pixels along one element of the state.
        vae: of whose latents the state is made; None for pixels.
    """

    size: Size
    patch: int
    resolution: int
    classes: int
    channels: int = 3
    factor: int = 1
    vae: Component | None = None

    @property
    def side(self) -> int:
        """Of the state, in its elements."""
        return self.resolution // self.factor

    @property
    def dim(self) -> int:
        """D, numbers of a token."""
        return self.channels * self.patch**2

    @property
    def space(self) -> Space:
        """Where the states lie."""
        return "pixel" if self.vae is None else "latent"

    @property
    def units(self) -> str:
        """The word for elements of the state."""
        return "pixels" if self.vae is None else "latents"


def _jit(shape: Shape) -> dict[str, Any]:
    layers, heads, head = WIDTHS[shape.size]
    small = {"tiny": (64, 2, 8), "S": (128, 4, 32)}
    bottleneck, start, context = small.get(shape.size) or (256 if shape.size == "H" else 128, layers // 3, 32)
    return {
        "sample_size": shape.side,
        "patch_size": shape.patch,
        "in_channels": shape.channels,
        "num_layers": layers,
        "num_attention_heads": heads,
        "attention_head_dim": head,
        "bottleneck_dim": bottleneck,
        "num_classes": shape.classes,
        "context_tokens": context,
        "context_start": start,
        "dropout": 0.2 if shape.size == "H" else 0.0,
        "upcast_attention": shape.size != "tiny",
    }


def _dit(shape: Shape) -> dict[str, Any]:
    layers, heads, head = WIDTHS[shape.size]
    return {
        "sample_size": shape.side,
        "patch_size": shape.patch,
        "in_channels": shape.channels,
        "out_channels": shape.channels,
        "num_layers": layers,
        "num_attention_heads": heads,
        "attention_head_dim": head,
        "num_embeds_ada_norm": shape.classes,
    }


def _prx(shape: Shape) -> dict[str, Any]:
    layers, heads, head = WIDTHS[shape.size]
    return {
        "in_channels": shape.channels,
        "patch_size": shape.patch,
        "context_in_dim": shape.classes + 1,
        "hidden_size": heads * head,
        "num_heads": heads,
        "depth": layers,
        "axes_dim": [head // 2, head // 2],
    }


def _flux2(shape: Shape) -> dict[str, Any]:
    layers, heads, head = WIDTHS[shape.size]
    double = max(layers // 4, 1)
    return {
        "patch_size": 1,
        "in_channels": shape.dim,
        "num_layers": double,
        "num_single_layers": layers - double,
        "attention_head_dim": head,
        "num_attention_heads": heads,
        "joint_attention_dim": shape.classes + 1,
        "axes_dims_rope": (head // 4,) * 4,
        "guidance_embeds": False,
    }


NETWORKS: dict[str, tuple[str, Callable[[Shape], dict[str, Any]]]] = {
    "jit": ("JiTTransformer2DModel", _jit),
    "dit": ("DiTTransformer2DModel", _dit),
    "prx": ("PRXTransformer2DModel", _prx),
    "flux2": ("Flux2Transformer2DModel", _flux2),
}
"""By the word of ``--architecture``: the stock class, and its config with the channels of pixels."""
