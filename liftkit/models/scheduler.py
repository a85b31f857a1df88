"""Schedulers for lifted models: the base's own noise levels, seen from pixel space.

A latent model at noise level tau and its pixel twin at sigma = s tau / (1 + (s - 1) tau) do the same work
(Theorem 1). Whatever grid a scheduler makes (static or dynamic shift, terminal stretch, Karras), the lifted
scheduler makes the same grid and maps it so; a shift m becomes m * s.

A scheduler may have a grid of its own instead, as the authors' models do: ``pixel_shift`` is a shift on the pixel side, for images
of ``pixel_shift_side`` pixels squared, and in proportion to the square root of the number of pixels; the same for all where there
is no side. ``clamp`` describes the color space of the states: the denoised estimate is then clamped to its gamut at every step.
``guidance_orthogonal`` is how :mod:`liftkit.models.guidance` guides where nothing else is asked for.

A lifted scheduler with ``lift_scale`` 1 serves a latent model: ``--solver`` gives one to pixel and latent models alike.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput

from liftkit.asymflow import lift_sigma
from liftkit.color import ColorSpace, color_from_dict
from liftkit.errors import UsageError
from liftkit.models.solvers import FlowMatchHeunDiscreteScheduler, FlowMatchSDEDiscreteScheduler
from liftkit.models.spec import HOME

# Multistep solvers take the logarithm of 1 - sigma.
NOT_QUITE_ONE = 1.0 - 1e-4
ADDED = {
    "lift_scale": 1.0, "pixel_shift": None, "pixel_shift_side": None, "patch_size": 16, "clamp": None, "guidance_orthogonal": None,
}  # fmt: skip
"""What a lifted scheduler's config has beside its stock class's, with the defaults."""
MULTISTEP = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
"""What makes a multistep scheduler one of flows."""


class LiftedScheduleMixin:
    """Maps the grid of a diffusers flow scheduler through the lift scale: sigma = s tau / (1 + (s - 1) tau)."""

    config: Any
    sigmas: Any
    timesteps: Any
    order: int
    num_inference_steps: Any
    step_index: int | None
    _step_index: int | None
    _init_step_index: Any
    start: Callable[[Any], Any] | None = None
    """Gives the clean state of a start image, of the noise in whatever layout the pipeline has it."""
    strength: float = 1.0
    """Share of the steps that are taken where there is a start image."""
    skipped: int = 0
    """Evaluations at the front of the grid that are left out."""

    def _begin_late(self) -> None:
        """Cut the grid where a start image takes over.

        Pipelines hand over noise, and the level at which the image is to be noised follows from the grid that they ask for. So the
        grid keeps one evaluation before that level, whose step goes to the noised image, whatever the network says.
        """
        steps = self.num_inference_steps
        first = int(max(steps - min(steps * self.strength, steps), 0)) if self.start is not None else 0
        self.skipped = max(first * self.order - 1, 0)
        self.sigmas, self.timesteps = self.sigmas[self.skipped :], self.timesteps[self.skipped :]

    def _noised(self, noise: Any) -> Any:
        """The start image at the second level of the grid."""
        assert self.start is not None
        level = noise_level(self, 1)
        self._step_index = 1
        return (1.0 - level) * self.start(noise).to(noise) + level * noise

    def _lift_grid(self, inverted: bool) -> None:
        """Map the grid.

        Args:
            inverted: it counts upward, from data to noise as 1 - sigma (OmniGen).
        """
        device, steps = self.timesteps.device, len(self.timesteps)
        lifted = lift_sigma(1.0 - self.sigmas if inverted else self.sigmas, self.config.lift_scale)
        self.sigmas = 1.0 - lifted if inverted else lifted
        # The time is the unrounded sigma: some solvers tell the network an integer, which k and the
        # recovery of the velocity, made for the true sigma, would not agree with.
        self.timesteps = (self.sigmas[:steps] * self.config.num_train_timesteps).to(device)

    def _own_grid(self, sigmas: Any, mu: float | None, steps: int) -> None:
        """sigma = m t / (1 + (m - 1) t) for t falling evenly from 1, or as given; m by the number of pixels."""
        device = self.timesteps.device
        even = (
            torch.linspace(1.0, 0.0, steps + 1)[:-1] if sigmas is None else torch.as_tensor(sigmas, dtype=torch.float32)
        )
        shift = self.config.pixel_shift
        if self.config.pixel_shift_side and mu is not None:
            tokens = tokens_of(mu, steps)
            shift *= self.config.patch_size * tokens**0.5 / self.config.pixel_shift_side if tokens else 1.0
        grid = lift_sigma(even, shift)
        grid = torch.cat([grid, grid.new_zeros(1)])
        if self.config.get("invert_sigmas"):
            grid = 1.0 - grid
        self.timesteps = (grid[:-1] * self.config.num_train_timesteps).to(device)
        self.sigmas = grid if isinstance(self, FlowMatchEulerDiscreteScheduler) else grid.clamp(max=NOT_QUITE_ONE)

    def _clamped(self, velocity: Any, timestep: Any, sample: Any) -> Any:
        """The velocity towards the denoised estimate with its colors clamped to the gamut.

        Args:
            velocity, sample: tokens (B, N, 3 P^2) or folded images (B, 3 f^2, h, w); of each the color is the slowest index.
        """
        if self.step_index is None:
            self._init_step_index(timestep)
        assert self.step_index is not None
        sigma, sign = noise_level(self, self.step_index), -1.0 if self.config.get("invert_sigmas") else 1.0
        state = sample.float()
        denoised = state - sign * sigma * velocity.float()
        color = color_from_dict(self.config.clamp)
        if state.ndim == 3:
            images = denoised.unflatten(2, (3, -1)).transpose(1, 2)
            within = color.encode(color.decode(images)).transpose(1, 2).reshape(state.shape)
        else:
            images = denoised.reshape(len(state), 3, -1, state.shape[-1])
            within = color.encode(color.decode(images)).reshape(state.shape)
        return sign * (state - within) / sigma


def noise_level(scheduler: Any, step: int) -> float:
    """The noise level in [0, 1] of a step of a flow scheduler, which may count upward (``invert_sigmas``)."""
    sigma = float(scheduler.sigmas[step])
    return 1.0 - sigma if scheduler.config.get("invert_sigmas") else sigma


def tokens_of(mu: float, steps: int) -> int | None:
    """The number of an image's tokens, from what FLUX.2's pipelines make of it for their schedulers; None if it is from elsewhere.

    Their rule is linear in the tokens below and above a threshold. Both lines are inverted, and whichever gives a whole number
    that the rule turns into ``mu`` is the one.
    """
    from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

    for first, second in ((1, 2), (10**6, 10**6 + 1)):
        low, high = compute_empirical_mu(first, steps), compute_empirical_mu(second, steps)
        tokens = round(first + (mu - low) / (high - low))
        if tokens > 0 and abs(compute_empirical_mu(tokens, steps) - mu) < 1e-9:
            return tokens
    return None


def _lifted(stock: Any, **more: Any) -> Any:
    known = ADDED | more
    parameters = list(inspect.signature(stock.__init__).parameters.values())
    parameters += [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=value) for n, value in known.items()]

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        added = {name: kwargs.pop(name, value) for name, value in known.items()}
        stock.__init__(self, *args, **kwargs)
        self.register_to_config(**added)
        if isinstance(self, FlowMatchEulerDiscreteScheduler):
            # Its training grid, from which noise levels are drawn by index.
            self._lift_grid(inverted=False)

    __init__.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]

    # Wrapped, because pipelines read its signature to see what a scheduler takes.
    @functools.wraps(stock.set_timesteps)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        if self.config.pixel_shift is None:
            stock.set_timesteps(self, *args, **kwargs)
            self._lift_grid(bool(self.config.get("invert_sigmas")))
        else:
            given = inspect.signature(stock.set_timesteps).bind(self, *args, **kwargs).arguments
            sigmas = given.get("sigmas")
            steps = len(sigmas) if sigmas is not None else given["num_inference_steps"]
            stock.set_timesteps(self, steps, device=given.get("device"))
            self._own_grid(sigmas, given.get("mu"), steps)
        if isinstance(self, FlowMatchHeunDiscreteScheduler):
            self.repeated()
        self._begin_late()

    @functools.wraps(stock.step)
    def step(self: Any, model_output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
        if self.skipped and not self.step_index:
            state = self._noised(sample.float()).to(model_output.dtype)
            return (state,) if kwargs.get("return_dict") is False else FlowMatchEulerDiscreteSchedulerOutput(state)
        if self.config.clamp is not None:
            model_output = self._clamped(model_output, timestep, sample)
        return stock.step(self, model_output, timestep, sample, *args, **kwargs)

    def scale_model_input(self: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
        """The sample as it is. Pipelines ask for it of every scheduler that is not exactly the stock flow scheduler (Bria)."""
        return sample

    name = f"Asym{stock.__name__}"
    doc = f"``{stock.__name__}`` on the noise levels of a lifted model; ``lift_scale`` is s."
    attributes = {
        "__module__": HOME, "__doc__": doc, "__init__": __init__, "set_timesteps": set_timesteps, "step": step,
    }  # fmt: skip
    if not hasattr(stock, "scale_model_input"):
        attributes["scale_model_input"] = scale_model_input
    return type(name, (LiftedScheduleMixin, stock), attributes)


AsymFlowMatchEulerDiscreteScheduler = _lifted(FlowMatchEulerDiscreteScheduler)
AsymUniPCMultistepScheduler = _lifted(UniPCMultistepScheduler)
AsymDPMSolverMultistepScheduler = _lifted(DPMSolverMultistepScheduler)
AsymFlowMatchHeunDiscreteScheduler = _lifted(FlowMatchHeunDiscreteScheduler)
AsymFlowMatchSDEDiscreteScheduler = _lifted(FlowMatchSDEDiscreteScheduler, eta=1.0)
SOLVERS = {
    "euler": AsymFlowMatchEulerDiscreteScheduler,
    "heun": AsymFlowMatchHeunDiscreteScheduler,
    "sde": AsymFlowMatchSDEDiscreteScheduler,
    "unipc": AsymUniPCMultistepScheduler,
}
SCHEDULERS = (*(each.__name__ for each in SOLVERS.values()), "AsymDPMSolverMultistepScheduler")


def authors_config(sampling: dict[str, Any], scale: float, patch: int, color: ColorSpace) -> dict[str, Any]:
    """The config of a lifted scheduler that samples as an adapter's record says; its ``_class_name`` is the class.

    Args:
        sampling: ``solver`` (of :data:`SCHEDULERS`, without its prefix), ``shift``, ``shift_side``, ``clamp``,
            and ``orthogonal`` if it has that.
        scale: s.
        patch: P.
        color: of the states.
    """
    solver = str(sampling["solver"])
    multistep = MULTISTEP if "Multistep" in solver else {}
    return {
        "_class_name": f"Asym{solver}",
        "num_train_timesteps": 1000,
        **multistep,
        "lift_scale": scale,
        "pixel_shift": sampling["shift"],
        "pixel_shift_side": sampling["shift_side"],
        "patch_size": patch,
        "clamp": color.to_dict() if sampling["clamp"] else None,
        "guidance_orthogonal": sampling.get("orthogonal"),
    }


def with_solver(scheduler: Any, solver: str, **changes: Any) -> Any:
    """A scheduler on the noise levels of another that steps by another method.

    Args:
        scheduler: of a pixel or a latent model.
        solver: of :data:`SOLVERS`.
        changes: of its config, such as ``eta`` of the stochastic solver.

    Raises:
        UsageError: if the solver cannot count upward as the scheduler does.
    """
    kind, config = SOLVERS[solver], dict(scheduler.config)
    flow_matching = issubclass(kind, FlowMatchEulerDiscreteScheduler)
    if config.get("invert_sigmas") and not flow_matching:
        raise UsageError(
            f"--solver {solver}: it has no noise levels that count upward, as this model's do; take another"
        )
    shift = config.get("flow_shift", config.get("shift", 1.0))
    changes |= {"shift": shift} if flow_matching else {**MULTISTEP, "flow_shift": shift}
    parameters = inspect.signature(kind.__init__).parameters
    return kind(**{name: value for name, value in config.items() if name in parameters} | changes)


def with_start(scheduler: Any, start: Callable[[Any], Any], strength: float) -> Any:
    """A scheduler like another, pixel or latent, that begins at a start image; see :class:`LiftedScheduleMixin`."""
    kind = type(scheduler)
    if not isinstance(scheduler, LiftedScheduleMixin):
        kind = globals()[f"Asym{kind.__name__}"]
    late = kind.from_config(scheduler.config)
    late.start, late.strength = start, strength
    return late


def with_shift(scheduler: Any, shift: float) -> Any:
    """A scheduler like another, with one shift for every size: of its own noise levels, pixel or latent.

    Raises:
        UsageError: if its class has no shift.
    """
    config = scheduler.config
    if isinstance(scheduler, LiftedScheduleMixin):
        changes = {"pixel_shift": shift, "pixel_shift_side": None}
    elif "flow_shift" in config:
        changes = {"flow_shift": shift}
    elif "shift" in config:
        changes = {"shift": shift}
    else:
        raise UsageError(f"--shift: {type(scheduler).__name__} has none; leave it out")
    if "use_dynamic_shifting" in config:
        changes["use_dynamic_shifting"] = False
    return type(scheduler).from_config(config, **changes)


def with_clamp(scheduler: Any, color: dict[str, Any] | None) -> Any:
    """A scheduler like another that clamps the denoised estimate to the gamut of a color space, or does not."""
    return type(scheduler).from_config(scheduler.config, clamp=color)
