"""FlowModel: one face for latent and pixel transformers, ``velocity(x_t, sigma, **conditioning)`` on images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from liftkit.errors import UsageError
from liftkit.models.layout import Layout
from liftkit.models.mixin import SPACE, channels_for
from liftkit.models.registry import architecture, is_lifted
from liftkit.models.spec import Grid, counts
from liftkit.tokens import patchify, unpatchify

GUIDANCE = 4.0
"""The guidance of a guidance-distilled model where the caller gives none."""


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
        self.config: Mapping[str, Any] = transformer.config
        self.is_lifted = is_lifted(name) and not latent
        self.is_pixel = self.is_lifted and self.config.get(SPACE, "pixel") == "pixel"
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
        spec = self.architecture
        folded = F.pixel_unshuffle(state, self.fold) if self.fold > 1 else state
        if spec.pipeline_latents is not None:
            return spec.pipeline_latents(folded)
        # Pipelines that take lists of images make them by themselves.
        return folded if spec.layout is Layout.LIST else self._packed(folded)

    def running_state(self, state: Tensor, like: Tensor) -> Tensor:
        """An image-shaped state as a pipeline's running latents have it, shaped like ``like``: inverse of
        :meth:`state_of_pipeline`."""
        folded = F.pixel_unshuffle(state, self.fold) if self.fold > 1 else state
        if like.ndim == 3:
            return patchify(folded, self.latent_patch, self.architecture.state_order)
        if folded.shape[-2] > like.shape[-2]:  # FLUX.2's tokens as images
            folded = F.pixel_unshuffle(folded, folded.shape[-2] // like.shape[-2])
        return folded.reshape(like.shape)

    def state_of_pipeline(self, latents: Tensor, height: int, width: int) -> Tensor:
        """A pipeline's running ``latents`` as a state (B, C, height, width); of a pixel model's, folded on the VAE's grid."""
        spec = self.architecture
        if latents.ndim == 3:
            return unpatchify(latents, self.latent_patch, height, width, spec.state_order)
        folded = spec.layout.unwrap(latents) if latents.ndim > 4 else latents
        return F.pixel_shuffle(folded, height // folded.shape[-2]) if folded.shape[-2] < height else folded

    def velocity(self, x_t: Tensor, sigma: Tensor, **conditioning: Any) -> Tensor:
        """The velocity of a state.

        Args:
            x_t: (B, 3, H, W) in the color space for a pixel model, (B, C, h, w) normalized latents for a latent
                one; sides divisible by :attr:`token_side`.
            sigma: (B,) noise levels in [0, 1].
            conditioning: tensors (B, ...) that the architecture makes arguments of the transformer's forward from, for
                example ``encoder_hidden_states``. Position ids that follow from the grid are added where not given; so are
                channels of clean images and masks, as zeros. ``references`` (B, R, C, H, W) are clean images shaped like the
                state that the network sees beside it, where the architecture knows how.

        Returns:
            u = eps - x_0, shaped like ``x_t``.
        """
        spec = self.architecture
        folded = F.pixel_unshuffle(x_t, self.fold) if self.fold > 1 else x_t
        rows, columns = (each // self.latent_patch for each in folded.shape[-2:])
        references = conditioning.pop("references", None)
        arguments = spec.arguments(Grid(len(x_t), rows, columns, x_t.device, self.config), conditioning)
        if self.config.get("guidance_embeds") and "guidance" not in arguments:
            arguments["guidance"] = torch.full((len(x_t),), GUIDANCE, device=x_t.device)
        dtype = self.transformer.dtype
        arguments = _cast(arguments, dtype)
        # An Asym twin takes its state in float32 and rounds after its gain; the stock class wants its own dtype.
        packed = self._packed(folded if self.is_lifted else folded.to(dtype))
        if references is not None:
            packed = self._beside(packed, references.to(packed.dtype), arguments)
        arguments[spec.state] = spec.sequence(self._filled(packed), arguments)
        time = sigma.to(torch.promote_types(sigma.dtype, torch.float32))
        # It finds the network's time by itself.
        if not self.is_lifted:
            time = spec.network_time(time, rows * columns).to(torch.promote_types(dtype, torch.float32))
        arguments[spec.time] = spec.clock.time(time)
        output = self.call(**arguments, return_dict=False)
        answer = output if isinstance(output, Tensor) else output[0]
        if references is not None and spec.layout is Layout.TOKENS:
            answer = answer[:, : rows * columns]
        output = spec.sign * self._unpacked(answer, rows, columns)
        return F.pixel_shuffle(output, self.fold) if self.fold > 1 else output

    def _beside(self, packed: Any, references: Tensor, arguments: dict[str, Any]) -> Any:
        """A packed state with references (B, R, C, H, W) beside it, which the arguments then tell from it.

        Raises:
            UsageError: if the architecture does not know how.
        """
        if self.architecture.beside is None:
            raise UsageError(f"{self.architecture.name}: not known how it is shown reference images; leave them out")
        clean = (F.pixel_unshuffle(each, self.fold) if self.fold > 1 else each for each in references.unbind(1))
        return self.architecture.beside(packed, [self._packed(each) for each in clean], arguments)

    def _packed(self, folded: Tensor) -> Any:
        """A state on the VAE's grid, (B, C, h, w), as ``forward`` sees it."""
        spec = self.architecture
        if spec.layout is Layout.TOKENS:
            return patchify(folded, self.latent_patch, spec.state_order)
        cells = self.latent_patch // spec.cell(self.config)
        return spec.layout.wrap(F.pixel_unshuffle(folded, cells) if cells > 1 else folded)

    def _unpacked(self, output: Any, rows: int, columns: int) -> Tensor:
        """The inverse of :meth:`_packed` for what ``forward`` returns: the last tokens, the first block of channels."""
        spec, size = self.architecture, self.architecture.block_size(self.config)
        if spec.layout is Layout.TOKENS:
            height, width = rows * self.latent_patch, columns * self.latent_patch
            tokens = output[:, -rows * columns :, :size]
            return unpatchify(tokens, self.latent_patch, height, width, spec.state_order)
        folded = spec.layout.unwrap(output)[:, :size]
        cells = self.latent_patch // spec.cell(self.config)
        return F.pixel_shuffle(folded, cells) if cells > 1 else folded

    @property
    def channels_beside(self) -> int:
        """Channels of clean images and masks that ``forward`` takes beside the state's (Fill, Control)."""
        spec, size = self.architecture, self.architecture.block_size(self.config)
        if spec.state_channels is not None:
            count = spec.state_channels(self.config)
        else:
            count = max(self.config[key] for key in spec.channel_keys if self.config.get(key) is not None)
        return sum(counts(spec.inputs[0].blocks(count, size)[1:], size))

    def _filled(self, state: Any) -> Any:
        """The state with zeros for the channels of clean images and masks that this model takes beside it."""
        spec, beside = self.architecture, self.channels_beside
        if not beside:
            return state
        many = state if isinstance(state, list) else [state]
        axis = spec.layout.channel_axis - (1 if isinstance(state, list) else 0)
        many = [torch.cat([x, x.narrow(axis, 0, 1).expand(*_with(x.shape, axis, beside)) * 0], axis) for x in many]
        return many if isinstance(state, list) else many[0]


def _with(shape: torch.Size, axis: int, size: int) -> list[int]:
    result = list(shape)
    result[axis] = size
    return result


def _cast(arguments: Any, dtype: torch.dtype) -> Any:
    """Floating-point tensors in ``dtype``, in lists too."""
    if isinstance(arguments, Mapping):
        return {key: _cast(value, dtype) for key, value in arguments.items()}
    if isinstance(arguments, list | tuple):
        return type(arguments)(_cast(each, dtype) for each in arguments)
    return arguments.to(dtype) if isinstance(arguments, Tensor) and arguments.is_floating_point() else arguments


def open_flow(transformer: Any) -> FlowModel:
    """A :class:`FlowModel` over a transformer in memory, stock or converted."""
    return FlowModel(transformer)


@dataclass(frozen=True)
class GuidedFlow:
    """A flow model with classifier-free guidance.

    Args:
        flow: the model.
        against: what takes the place of the same conditioning where the model is not shown the prompt, for one image or all;
            what it does not name, such as references, is shown both times.
        scale: of the guidance; 1 is none.
    """

    flow: FlowModel
    against: Mapping[str, Tensor]
    scale: float

    def velocity(self, x_t: Tensor, sigma: Tensor, **conditioning: Tensor) -> Tensor:
        """The guided velocity, float32; see :meth:`FlowModel.velocity`. Both halves are one batch."""
        both = {
            name: torch.cat([value, self.against[name].expand_as(value) if name in self.against else value])
            for name, value in conditioning.items()
        }
        found = self.flow.velocity(torch.cat([x_t, x_t]), torch.cat([sigma, sigma]), **both).float()
        prompted, without = found.chunk(2)
        return without + self.scale * (prompted - without)


@torch.no_grad()
def euler(
    flow: FlowModel | GuidedFlow,
    x: Tensor,
    sigmas: Tensor,
    conditioning: dict[str, Any],
    trace: list[Tensor] | None = None,
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
