"""The pixel twin's forward as a pure function: what is done to the arguments of a latent network, and to what it answers.

z-like state  k x_t        (clean images / s)
time          tau = k sigma
velocity      recovered from the answer in float32, token by token
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from liftkit.asymflow import at_least_float32, calibrate
from liftkit.errors import UsageError
from liftkit.models.layout import Layout
from liftkit.models.planes import Refine, refined, refined_tokens
from liftkit.models.spec import LIFTED, Architecture, Config, counts
from liftkit.tokens import patchify, unpatchify

Recover = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def lifted_forward(
    spec: Architecture,
    config: Config,
    recover: Recover,
    dtype: torch.dtype,
    call: Callable[..., Any],
    arguments: Mapping[str, Any],
    refine: Refine | None = None,
) -> Any:
    """One call of a pixel model.

    Args:
        spec: the architecture.
        config: of the pixel model.
        recover: tokens (B, N, D) of the answer and the state, sigma (B,) and s to the velocity (Eq. 17); holds A.
        dtype: that the network computes in.
        call: the network with the surgery's projections.
        arguments: of the stock forward, with the state in pixels and the time of sigma.
        refine: changes the velocity as images in the color space: see :mod:`liftkit.models.detail_head`.

    Returns:
        What ``call`` returns, its sample replaced by the full velocity: float32 or float64, with the stock class's sign.
    """
    scale = config["lift_scale"]
    x_t, time = arguments[spec.state], arguments[spec.time]
    sigma = spec.clock.sigma(at_least_float32(_per_sample(time))).reshape(-1).expand(len(x_t))
    gain, tau = calibrate(sigma, scale)
    changed = {
        name: _scaled(arguments[name], 1.0 / scale, dtype)
        for name in spec.clean_inputs
        if arguments.get(name) is not None
    }
    changed[spec.state] = _state(spec, config, x_t, gain, spec.clean_tokens(arguments), dtype)
    clocked = spec.clock.time(spec.network_time(tau, _tokens(spec, config, x_t)))
    clocked = clocked.to(torch.promote_types(dtype, torch.float32))
    changed[spec.time] = clocked[:, None].expand(-1, time.shape[1]) if time.ndim == 2 else clocked
    output = call(**{**arguments, **changed})
    alone = isinstance(output, Tensor)  # Kandinsky 5 without return_dict
    answer = output if alone else output[0]
    if spec.layout is Layout.TOKENS:
        velocity = _velocity_of_tokens(spec, config, recover, refine, answer, sigma, arguments)
    else:
        velocity = _velocity(spec, config, recover, refine, answer, x_t, sigma)
    if alone:
        return velocity
    if isinstance(output, tuple):
        return (velocity, *output[1:])
    output.sample = velocity
    return output


def _per_sample(time: Tensor) -> Tensor:
    """One time a sample, of a tensor that may have one a token (Wan 2.2 5B).

    Raises:
        UsageError: if the tokens of a sample have times of their own.
    """
    if time.ndim < 2:
        return time
    if not torch.equal(time, time[:, :1].expand_as(time)):
        raise UsageError(
            "a pixel model takes one noise level a sample; images as first frames of a video are not supported"
        )
    return time[:, 0]


def _scaled(value: Any, factor: float, dtype: torch.dtype) -> Any:
    """A clean latent, or a list of them, in the network's units."""
    if isinstance(value, list | tuple):
        return type(value)(_scaled(each, factor, dtype) for each in value)
    return (at_least_float32(value) * factor).to(dtype) if isinstance(value, Tensor) else value


def _state(spec: Architecture, config: Config, x_t: Any, gain: Tensor, clean: Tensor | None, dtype: torch.dtype) -> Any:
    """The state times k; its clean tokens and channels times 1 / s, and channels that stay as they are."""
    if isinstance(x_t, list | tuple):
        rows = [_state(spec, config, x[None], k[None], None, dtype)[0] for x, k in zip(x_t, gain)]
        return type(x_t)(rows)
    shape, axis = [1] * x_t.ndim, spec.layout.channel_axis
    shape[0] = len(gain)
    factor, scale = gain.reshape(shape), config["lift_scale"]
    if clean is not None:
        factor = torch.where(clean.reshape(*clean.shape, *(1,) * (x_t.ndim - 2)), 1.0 / scale, factor)
    size = spec.block_size(config)
    blocks = spec.inputs[0].blocks(x_t.shape[axis], size)
    if len(blocks) > 1:
        others = [1.0 / scale if each == LIFTED else 1.0 for each in blocks[1:]]
        parts = [factor, *(torch.full_like(factor, each) for each in others)]
        factor = torch.cat([part.repeat_interleave(n, axis) for part, n in zip(parts, counts(blocks, size))], axis)
    return (at_least_float32(x_t) * factor).to(dtype)


def _tokens(spec: Architecture, config: Config, x_t: Any) -> int:
    """Tokens of one sample."""
    first = x_t[0]
    if spec.layout is Layout.TOKENS:
        return int(first.shape[0])
    channels = x_t[0][None].shape[spec.layout.channel_axis]
    return int(first.numel() // (channels * spec.cell(config) ** 2))


def _velocity(
    spec: Architecture, config: Config, recover: Recover, refine: Refine | None, output: Any, x_t: Any, sigma: Tensor
) -> Any:
    """The velocity in place of the first block of the network's answer; further blocks stay."""
    scale, size = config["lift_scale"], spec.block_size(config)
    patch, parts = spec.cell(config), []
    answers, states = spec.layout.split(output), spec.layout.split(x_t)
    levels = [sigma] if spec.layout is Layout.IMAGE else sigma
    for answer, state, level in zip(answers, states, levels):
        noise = level.reshape(-1).expand(len(state))
        tokens = patchify(spec.sign * answer[:, :size], patch), patchify(state[:, :size], patch)
        recovered = unpatchify(recover(*tokens, noise, scale), patch, *state.shape[-2:])
        if refine is not None:
            recovered = refined(spec, config, refine, (state[:, :size], recovered), noise)
        beyond = answer[:, size:]
        recovered = spec.sign * recovered
        parts.append(torch.cat([recovered, beyond], 1) if beyond.shape[1] else recovered)
    return spec.layout.join(parts)


def _velocity_of_tokens(
    spec: Architecture,
    config: Config,
    recover: Recover,
    refine: Refine | None,
    output: Tensor,
    sigma: Tensor,
    arguments: Mapping[str, Any],
) -> Tensor:
    """:func:`_velocity` for packed tokens."""
    x_t, size = arguments[spec.state], spec.block_size(config)
    # Text or reference tokens may come first, in the answer or in the state.
    rows = min(output.shape[1], x_t.shape[1])
    answer, state = output[:, -rows:, :size], x_t[:, -rows:, :size]
    velocity = recover(spec.sign * answer, state, sigma, config["lift_scale"])
    if refine is not None:
        velocity = refined_tokens(spec, config, refine, (state, velocity), sigma, arguments)
    return _replaced(output, spec.sign * velocity, -rows)


def _replaced(output: Tensor, velocity: Tensor, start: int) -> Tensor:
    """Tokens (B, N, ...) with the velocity in its place."""
    if output.shape == velocity.shape:
        return velocity
    result = output.to(velocity.dtype, copy=True)
    result[:, start:, : velocity.shape[-1]] = velocity
    return result
