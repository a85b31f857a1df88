"""FlowModel: one face for latent and pixel transformers, ``velocity(x_t, sigma, **conditioning)`` on images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import isqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from liftkit.models.layout import Layout
from liftkit.models.mixin import channels_for
from liftkit.models.registry import architecture, is_lifted
from liftkit.models.spec import Grid
from liftkit.tokens import patchify, unpatchify

GUIDANCE = 4.0
"""What a guidance-distilled model is told where the caller says nothing."""


class FlowModel:
    """A flow transformer that speaks images, noise levels in [0, 1] and velocities u = eps - x_0.

    Args:
        transformer: a supported stock diffusers transformer, or its Asym twin.
        call: runs the network in the transformer's place: a wrapped one, with the same arguments.
        latent: whether ``call`` runs the weights that an Asym twin shares with the latent network it came from, as that.

    Raises:
        UsageError: if the class is not supported.
    """

    def __init__(self, transformer: Any, call: Callable[..., Any] | None = None, latent: bool = False) -> None:
        name = type(transformer).__name__
        self.transformer = transformer
        self.call = call if call is not None else transformer
        self.architecture = architecture(name)
        self.is_pixel = is_lifted(name) and not latent
        self.config: Mapping[str, Any] = transformer.config
        if latent:
            self.config = channels_for(self.architecture, dict(transformer.config), latent=True)
        self.latent_patch = self.architecture.latent_patch(self.config)
        side = isqrt(self.config["lift_dim"] // 3) if self.is_pixel else self.latent_patch
        self.fold = side // self.latent_patch

    @property
    def channels(self) -> int:
        """Channels of the state: 3 for a pixel model, the VAE's for a latent one."""
        size = self.architecture.token_size(self.config)
        return size // (self.latent_patch * self.fold) ** 2

    @property
    def token_side(self) -> int:
        """Side of a token's patch, in elements of the state: pixels or latents."""
        return self.latent_patch * self.fold

    def pipeline_state(self, state: Tensor) -> Tensor:
        """An image-shaped state as the ``latents`` argument of the stock pipeline."""
        folded = F.pixel_unshuffle(state, self.fold) if self.fold > 1 else state
        given = self.architecture.pipeline_latents
        return folded if given is None else given(folded)

    def state_of_pipeline(self, latents: Tensor, height: int, width: int) -> Tensor:
        """A latent pipeline's running ``latents`` as a state (B, C, height, width)."""
        return unpatchify(latents, self.latent_patch, height, width) if latents.ndim == 3 else latents

    def velocity(self, x_t: Tensor, sigma: Tensor, **conditioning: Any) -> Tensor:
        """The velocity of a state.

        Args:
            x_t: (B, 3, H, W) in the color space for a pixel model, (B, C, h, w) normalized latents for a latent
                one; sides divisible by :attr:`token_side`.
            sigma: (B,) noise levels in [0, 1].
            conditioning: arguments of the transformer's forward, for example ``encoder_hidden_states``. Position
                ids that follow from the grid are added where not given.

        Returns:
            u = eps - x_0, shaped like ``x_t``.
        """
        spec = self.architecture
        folded = F.pixel_unshuffle(x_t, self.fold) if self.fold > 1 else x_t
        height, width = folded.shape[-2:]
        grid = Grid(len(x_t), height // self.latent_patch, width // self.latent_patch, x_t.device, self.config)
        arguments = spec.arguments(grid, conditioning)
        if self.config.get("guidance_embeds") and "guidance" not in arguments:
            arguments["guidance"] = torch.full((len(x_t),), GUIDANCE, device=x_t.device)
        state = patchify(folded, self.latent_patch) if spec.layout is Layout.TOKENS else folded
        dtype = self.transformer.dtype
        arguments = {
            key: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
            for key, value in arguments.items()
        }
        # The pixel twin takes its state in float32 and rounds after its gain; the stock class wants its own dtype.
        arguments[spec.state] = state if self.is_pixel else state.to(dtype)
        arguments[spec.time] = spec.clock.time(sigma.to(torch.promote_types(sigma.dtype, torch.float32)))
        output = spec.sign * self.call(**arguments, return_dict=False)[0]
        if spec.layout is Layout.TOKENS:
            output = unpatchify(output, self.latent_patch, height, width)
        return F.pixel_shuffle(output, self.fold) if self.fold > 1 else output


def open_flow(transformer: Any) -> FlowModel:
    """A :class:`FlowModel` over a transformer in memory, stock or converted."""
    return FlowModel(transformer)


@torch.no_grad()
def euler(
    flow: FlowModel, x: Tensor, sigmas: Tensor, conditioning: dict[str, Any], trace: list[Tensor] | None = None
) -> Tensor:
    """Sample by Euler's method.

    Args:
        flow: the model.
        x: the state at ``sigmas[0]``.
        sigmas: (steps + 1,) falling noise levels, the last one usually 0.
        conditioning: see :meth:`FlowModel.velocity`.
        trace: if given, receives the state after every step.

    Returns:
        The state at ``sigmas[-1]``.
    """
    for now, after in zip(sigmas[:-1], sigmas[1:]):
        x = x + (after - now) * flow.velocity(x, now.expand(len(x)), **conditioning)
        if trace is not None:
            trace.append(x)
    return x
