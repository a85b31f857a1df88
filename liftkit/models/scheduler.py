"""Schedulers for lifted models: the base's own noise levels, seen from pixel space.

A latent model at noise level tau and its pixel twin at sigma = s tau / (1 + (s - 1) tau) do the same work
(Theorem 1). Whatever grid a scheduler makes (static or dynamic shift, terminal stretch, Karras), the lifted
scheduler makes the same grid and maps it so; a shift m becomes m * s.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from liftkit.asymflow import lift_sigma
from liftkit.models.spec import HOME


class LiftedScheduleMixin:
    """Maps the grid of a diffusers flow scheduler through the lift scale: sigma = s tau / (1 + (s - 1) tau)."""

    config: Any
    sigmas: Any
    timesteps: Any

    def _lift_grid(self) -> None:
        device, steps = self.timesteps.device, len(self.timesteps)
        self.sigmas = lift_sigma(self.sigmas, self.config.lift_scale)
        # The time is the unrounded sigma: some solvers tell the network an integer, which k and the
        # recovery of the velocity, made for the true sigma, would not agree with.
        self.timesteps = (self.sigmas[:steps] * self.config.num_train_timesteps).to(device)


def _lifted(stock: Any) -> Any:
    parameters = list(inspect.signature(stock.__init__).parameters.values())
    parameters.append(inspect.Parameter("lift_scale", inspect.Parameter.KEYWORD_ONLY, default=1.0, annotation=float))

    def __init__(self: Any, *args: Any, lift_scale: float = 1.0, **kwargs: Any) -> None:
        stock.__init__(self, *args, **kwargs)
        self.register_to_config(lift_scale=lift_scale)
        if isinstance(self, FlowMatchEulerDiscreteScheduler):
            # Its training grid, from which noise levels are drawn by index.
            self._lift_grid()

    __init__.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]

    # Wrapped, because pipelines read its signature to see what a scheduler takes.
    @functools.wraps(stock.set_timesteps)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        stock.set_timesteps(self, *args, **kwargs)
        self._lift_grid()

    name = f"Asym{stock.__name__}"
    doc = f"``{stock.__name__}`` on the noise levels of a lifted model; ``lift_scale`` is s."
    attributes = {"__module__": HOME, "__doc__": doc, "__init__": __init__, "set_timesteps": set_timesteps}
    return type(name, (LiftedScheduleMixin, stock), attributes)


AsymFlowMatchEulerDiscreteScheduler = _lifted(FlowMatchEulerDiscreteScheduler)
AsymUniPCMultistepScheduler = _lifted(UniPCMultistepScheduler)
AsymDPMSolverMultistepScheduler = _lifted(DPMSolverMultistepScheduler)
SCHEDULERS = (
    "AsymFlowMatchEulerDiscreteScheduler",
    "AsymUniPCMultistepScheduler",
    "AsymDPMSolverMultistepScheduler",
)
