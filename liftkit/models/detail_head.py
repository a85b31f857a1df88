"""A small convolutional network after the recovery, which sees across the borders of patches.

The network's last layer paints each patch alone, so that neighbors disagree along their border. The detail head takes a residual
from the recovered velocity of the whole image, in the color space::

    u' = u - h([xhat_0, c x_t, u], sigma)        xhat_0 = x_t - sigma u,   c = 1 / sqrt(alpha^2 + sigma^2),   alpha = 1 - sigma

which is ``xhat_0' = xhat_0 + sigma h``: nothing is divided by sigma. h works at half resolution (``pixel_unshuffle(2)``), in
``depth`` convolutions of 3 x 3 with ``channels`` channels between them; each but the last is followed by FiLM, a scale and a shift
by channel that depend on sigma, and SiLU. The last one begins at zero: ``u' = u`` to the last bit, and Theorem 1 holds as it is.

It stays in float32 and outside of the bare network: the frozen reference has none, and what shards or casts the network leaves
it alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from liftkit.errors import UsageError

HEAD, KEY = "detail_head", "lift_head"
"""Name of the module in a transformer, and of the entry of its config: ``{"channels": 48, "depth": 4}`` or None. diffusers would
take the module for the entry if both had one name."""
CHANNELS, DEPTH = 48, 4
WAVES = 16
"""Cosines of sigma that FiLM is made of."""


class DetailHead(nn.Module):
    """h of the equation above, and its residual.

    Args:
        channels: between its convolutions.
        depth: convolutions, two at least.

    Raises:
        ValueError: if either is no such number.
    """

    checkpointing = False
    """Compute again in the backward pass what it would keep: half a gigabyte for each image of 1024 x 1024 pixels."""

    def __init__(self, channels: int = CHANNELS, depth: int = DEPTH) -> None:
        super().__init__()
        for name, value, least in (("channels", channels, 1), ("depth", depth, 2)):
            if type(value) is not int or value < least:
                raise ValueError(f"{HEAD}: {name} is {value!r}, expected a whole number from {least} on")
        sizes = [9 * 4, *[channels] * (depth - 1), 3 * 4]
        self.layers = nn.ModuleList([nn.Conv2d(a, b, 3, padding=1) for a, b in zip(sizes, sizes[1:])])
        self.film = nn.Linear(WAVES, 2 * channels * (depth - 1))
        for last in (self.layers[-1], self.film):
            nn.init.zeros_(last.weight)  # type: ignore[arg-type]
            nn.init.zeros_(last.bias)  # type: ignore[arg-type]

    def forward(self, x_t: Tensor, u: Tensor, sigma: Tensor) -> Tensor:
        """The velocity with the detail of the whole image.

        Args:
            x_t: states (B, 3, H, W) in the color space, of even sides.
            u: their velocities, of the same shape.
            sigma: (B,) noise levels in [0, 1].

        Returns:
            u', shaped like ``u``, in the dtype of the head or of ``u``, whichever is wider; even under autocast.
        """
        with torch.autocast(u.device.type, enabled=False):
            dtype = self.film.weight.dtype
            state, velocity, level = (each.to(dtype) for each in (x_t, u, sigma))
            if self.checkpointing and torch.is_grad_enabled():
                return u - checkpoint(self._residual, state, velocity, level, use_reentrant=False)
            return u - self._residual(state, velocity, level)

    def _residual(self, x_t: Tensor, u: Tensor, sigma: Tensor) -> Tensor:
        level = sigma.view(-1, 1, 1, 1)
        unit = x_t * ((1.0 - level).square() + level.square()).rsqrt()
        y = F.pixel_unshuffle(torch.cat([x_t - level * u, unit, u], dim=1), 2)
        waves = torch.cos(math.pi * sigma[:, None] * torch.arange(WAVES, device=sigma.device, dtype=sigma.dtype))
        films = self.film(waves)[..., None, None].chunk(len(self.layers) - 1, dim=1)
        for layer, film in zip(self.layers, films):
            gain, shift = film.chunk(2, dim=1)
            y = F.silu(layer(y) * (1.0 + gain) + shift)
        return F.pixel_shuffle(self.layers[-1](y), 2)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DetailHead:
        """Move it; of a change to half precision nothing but the device is followed."""

        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            narrow = result.is_floating_point() and result.dtype not in (torch.float32, torch.float64)
            return tensor.to(result.device) if narrow else result

        return super()._apply(moved, recurse)  # type: ignore[return-value]

    @property
    def shape(self) -> dict[str, int]:
        """Its entry of a config."""
        return {"channels": self.layers[-1].in_channels, "depth": len(self.layers)}  # type: ignore[dict-item]

    def operations(self, pixels: int) -> int:
        """Floating-point operations of one forward on an image of so many pixels."""
        return pixels // 4 * sum(2 * layer.weight.numel() for layer in self.layers)  # type: ignore[operator,misc]


def head_shape(names: Mapping[str, tuple[int, ...]]) -> dict[str, int] | None:
    """The config's entry of a head by the shapes of a transformer's or an adapter's tensors; None where there is none of it.

    Raises:
        UsageError: if these are no tensors of a head, or not all of them.
    """
    found = {name.removeprefix(f"{HEAD}."): tuple(shape) for name, shape in names.items() if in_head(name)}
    if not found:
        return None
    depth = sum(name.startswith("layers.") and name.endswith(".weight") for name in found)
    channels = found.get("layers.0.weight", (0,))[0]
    if channels and depth >= 2:
        with torch.device("meta"):
            wanted = {name: tuple(tensor.shape) for name, tensor in DetailHead(channels, depth).state_dict().items()}
        if wanted == found:
            return {"channels": channels, "depth": depth}
    name, shape = next(iter(found.items()))
    raise UsageError(f"tensor {HEAD}.{name} of shape {shape}: not all of a detail head is there; is the file complete?")


def in_head(name: str) -> bool:
    """Whether a tensor or module of a transformer is in its detail head."""
    return name.startswith(f"{HEAD}.") or name == HEAD


def add_head(transformer: Any, channels: int, depth: int, seed: int = 0) -> DetailHead:
    """Give an Asym transformer a fresh head, which changes nothing yet.

    Args:
        transformer: in memory, without one.
        channels, depth: see :class:`DetailHead`.
        seed: of its weights.

    Raises:
        UsageError: if the transformer's patches have odd sides.
    """
    check_patch(math.isqrt(transformer.config["lift_dim"] // 3))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = DetailHead(channels, depth)
    transformer.detail_head = head.to(transformer.lift.basis.device)
    transformer.register_to_config(**{KEY: head.shape})
    return head


def check_patch(side: int) -> None:
    """Raise unless images of patches of this side can be halved.

    Raises:
        UsageError: if it is odd.
    """
    if side % 2:
        raise UsageError(f"{HEAD}: patches of {side} x {side} pixels: expected an even side; do without a head")
