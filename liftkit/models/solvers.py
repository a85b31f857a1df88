"""Solvers that step as the grid of a flow scheduler says: Heun's method and a stochastic one.

Both walk with the latent model that a pixel model was lifted from (Theorem 1). Euler's method does so by itself. The mean of
two velocities is another point in pixels than in latents, so that Heun's method takes it on the latent clock: in the state k x_t at
the time tau. For a model that was not lifted s is 1, and this is Heun's method as the textbooks have it.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from liftkit.asymflow import calibrate


class _Steps(FlowMatchEulerDiscreteScheduler):
    """The grid of the stock scheduler, another step."""

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        *_: Any,
        generator: Any = None,
        return_dict: bool = True,
        **__: Any,
    ) -> Any:
        """See ``FlowMatchEulerDiscreteScheduler.step``.

        Args:
            model_output: the velocity, (B, ...).
            timestep: of :attr:`timesteps`.
            sample: the state, (B, ...).
            generator: one or a list of B, of a stochastic solver's noise.
            return_dict: or a tuple.
        """
        if self.step_index is None:
            self._init_step_index(timestep)
        sign = -1.0 if self.config.invert_sigmas else 1.0
        after = self._after(sample.float(), sign * model_output.float(), self.step_index, generator)
        self._step_index += 1
        after = after.to(model_output.dtype)
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=after) if return_dict else (after,)

    def _level(self, index: int) -> Tensor:
        """The noise level in [0, 1], whichever way the grid counts."""
        sigma = self.sigmas[index].float()
        return 1.0 - sigma if self.config.invert_sigmas else sigma

    def _after(self, x: Tensor, u: Tensor, index: int, generator: Any) -> Tensor:
        """The state at the next level, of the state and its velocity ``u = eps - x_0`` at ``sigmas[index]``."""
        raise NotImplementedError


class FlowMatchHeunDiscreteScheduler(_Steps):
    """Heun's method: Euler's step, then the mean of the velocities at both of its ends; the last step is Euler's alone.

    N steps are 2 N - 1 evaluations: :meth:`repeated` puts every level but the first on the grid twice. The scheduler of this
    name in diffusers knows neither the dynamic shifts nor the ``sigmas`` that stock pipelines give.
    """

    order = 2
    sigmas: Tensor
    timesteps: Tensor
    skipped: int
    _predicted: tuple[int, Tensor, Tensor]

    def repeated(self) -> None:
        """After ``set_timesteps``: the grid with both evaluations of each step."""
        self.sigmas = torch.cat([self.sigmas[:1], self.sigmas[1:-1].repeat_interleave(2), self.sigmas[-1:]])
        self.timesteps = torch.cat([self.timesteps[:1], self.timesteps[1:].repeat_interleave(2)])

    def _after(self, x: Tensor, u: Tensor, index: int, generator: Any) -> Tensor:
        scale = self.config.lift_scale
        corrects = (index + self.skipped) % 2 == 1
        gain, _ = calibrate(self._level(index), scale)
        # The velocity of z_tau = k x_t, eps - x_0 / s, by the state and the velocity in pixels.
        v = (1.0 - 1.0 / scale) * x + u / (scale * gain)
        if corrects:
            start, z, first = self._predicted
            end, v = index, (first + v) / 2.0
        else:
            start, end, z = index, index + 1, gain * x
            self._predicted = index, z, v
        _, now = calibrate(self._level(start), scale)
        gain, tau = calibrate(self._level(end), scale)
        return (z + (tau - now) * v) / gain


class FlowMatchSDEDiscreteScheduler(_Steps):
    """Euler's method with fresh noise in the place of some of the old, as much as ``eta`` says; the marginals stay.

    A step from sigma to sigma' goes to ``(1 - sigma') x_0 + sqrt(sigma'^2 - eta^2 v^2) eps + eta v n``, with n standard normal and
    ``v^2 = sigma'^2 (1 - ((1 - sigma) sigma' / ((1 - sigma') sigma))^2)``, the variance of the noisier state's forgotten part
    (Song et al. 2021, arXiv 2010.02502, Eq. 16, for flows): 0 is Euler's method, 1 is ancestral sampling.
    """

    generators: Any = None
    """One or a list of ``torch.Generator``, for pipelines that give a step none."""

    def _after(self, x: Tensor, u: Tensor, index: int, generator: Any) -> Tensor:
        now, after = self._level(index), self._level(index + 1)
        fresh = self.config.eta * _renewed(now, after)
        denoised, noise = x - now * u, x + (1.0 - now) * u
        new = randn_tensor(x.shape, generator=generator or self.generators, device=x.device, dtype=x.dtype)
        return (1.0 - after) * denoised + (after.square() - fresh.square()).sqrt() * noise + fresh * new


def _renewed(now: Tensor, after: Tensor) -> Tensor:
    """v of :class:`FlowMatchSDEDiscreteScheduler`; written so that 0 and 1 are levels like others."""
    kept = (1.0 - now) * after / ((1.0 - after) * now).clamp_min(torch.finfo(now.dtype).tiny)
    return after * (1.0 - kept.square()).clamp_min(0.0).sqrt()
