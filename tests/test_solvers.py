"""Solvers against closed forms: of normal data everything that a solver should find is known."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from liftkit.asymflow import SIGMA_MIN, recover_velocity
from liftkit.errors import UsageError
from liftkit.lift import Lift
from liftkit.models import scheduler as schedules
from liftkit.models.loaded import Loaded
from liftkit.models.sampling import walked
from liftkit.models.scheduler import SOLVERS, noise_level, with_clamp, with_shift, with_solver
from liftkit.options import SampleOptions, Sampler
from tests.test_pipelines import deviation, exact_twin, load, states

MEAN, SPREAD = 0.3, 0.5
"""Of normal data, in every dimension."""


def velocity(x: torch.Tensor, sigma: float) -> torch.Tensor:
    """E[eps - x_0 | x_t] of normal data."""
    variance = (1 - sigma) ** 2 * SPREAD**2 + sigma**2
    centered = x - (1 - sigma) * MEAN
    return sigma / variance * centered - (1 - sigma) * SPREAD**2 / variance * centered - MEAN


def solved(scheduler: Any, x: torch.Tensor, steps: int) -> tuple[torch.Tensor, list[float]]:
    """The sample of a scheduler that is given the exact velocity, and the levels at which that was asked for."""
    scheduler.set_timesteps(sigmas=torch.linspace(1.0, 0.0, steps + 1)[:-1].tolist())
    sign = -1 if scheduler.config.invert_sigmas else 1
    levels = []
    for step, time in enumerate(scheduler.timesteps):
        levels.append(noise_level(scheduler, step))
        x = scheduler.step(sign * velocity(x, levels[-1]), time, x, return_dict=False)[0]
    return x, levels


def error(name: str, steps: int, **config: Any) -> float:
    noise = torch.linspace(-2.0, 2.0, 9)[None]
    # The probability flow of normal data maps quantiles to quantiles.
    return (solved(SOLVERS[name](**config), noise, steps)[0] - (MEAN + SPREAD * noise)).abs().max().item()


@pytest.mark.parametrize("config", [{}, {"lift_scale": 2.5}, {"invert_sigmas": True, "num_train_timesteps": 1}])
@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2)])
def test_halving_the_step_divides_the_error_by_two_to_the_order(name: str, order: int, config: dict[str, Any]) -> None:
    coarse, fine = (error(name, steps, **config) for steps in (32, 64))
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


def test_heun_evaluates_twice_but_for_the_last_step() -> None:
    _, levels = solved(SOLVERS["heun"](), torch.zeros(1, 2), 50)
    assert len(levels) == 99
    assert levels == pytest.approx([1.0, *(1 - k / 50 for k in range(1, 50) for _ in range(2))], abs=1e-6)


def test_heun_is_the_one_of_diffusers_on_the_same_levels() -> None:
    from diffusers import FlowMatchHeunDiscreteScheduler

    theirs, ours, noise = FlowMatchHeunDiscreteScheduler(), SOLVERS["heun"](), torch.linspace(-2.0, 2.0, 9)[None]
    theirs.set_timesteps(8)
    ours.set_timesteps(8)
    assert torch.allclose(theirs.timesteps, ours.timesteps)
    states = [noise, noise]
    for a, b in zip(theirs.timesteps, ours.timesteps):
        states = [
            each.step(velocity(x, float(t) / 1000), t, x, return_dict=False)[0]
            for each, t, x in ((theirs, a, states[0]), (ours, b, states[1]))
        ]
        assert torch.allclose(*states, atol=1e-5)


def variance(eta: float, steps: int) -> float:
    """Of the stochastic solver's samples of normal data, step by step."""
    found, grid = 1.0, torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64).tolist()
    for now, after in zip(grid[:-1], grid[1:]):
        marginal = (1 - now) ** 2 * SPREAD**2 + now**2
        denoised, noise = (1 - now) * SPREAD**2 / marginal, now / marginal
        renewed = after**2 * (1 - ((1 - now) * after / ((1 - after) * now)) ** 2) if after else 0.0
        kept = (1 - after) * denoised + math.sqrt(after**2 - eta**2 * renewed) * noise
        found = kept**2 * found + eta**2 * renewed
    return found


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_fresh_noise_leaves_the_marginals(eta: float) -> None:
    count = 200_000
    scheduler = SOLVERS["sde"](eta=eta)
    scheduler.generators = torch.Generator().manual_seed(0)
    noise = torch.randn(1, count, generator=torch.Generator().manual_seed(1))
    found, levels = solved(scheduler, noise, 24)
    assert len(levels) == 24
    # The standard error of a normal sample's variance, six times.
    assert found.var().item() == pytest.approx(variance(eta, 24), rel=6 * math.sqrt(2 / count))
    assert found.mean().item() == pytest.approx(MEAN, abs=6 * SPREAD / math.sqrt(count) + 1e-3)
    fine = [abs(variance(eta, steps) - SPREAD**2) for steps in (200, 400)]
    assert fine[0] < 0.04 * SPREAD**2
    assert fine[0] / fine[1] == pytest.approx(2, abs=0.1)


def test_without_fresh_noise_it_is_eulers_method() -> None:
    noise = torch.linspace(-2.0, 2.0, 9)[None]
    assert torch.allclose(solved(SOLVERS["sde"](eta=0.0), noise, 8)[0], solved(SOLVERS["euler"](), noise, 8)[0])


def test_noise_of_an_image_does_not_depend_on_its_batch() -> None:
    def sampled(seeds: list[int]) -> torch.Tensor:
        scheduler = SOLVERS["sde"]()
        scheduler.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return solved(scheduler, torch.zeros(len(seeds), 7), 5)[0]

    together = sampled([3, 4])
    assert torch.equal(together[1:], sampled([4]))
    assert not torch.equal(together[0], together[1])


class Tied:
    """The noise of a stochastic solver's steps: for the latent model, A^T of what the pixel model gets."""

    def __init__(self, draw: Any) -> None:
        self.draw, self.step = draw, 0

    def __call__(self, shape: Any, **_: Any) -> torch.Tensor:
        self.step += 1
        noise: torch.Tensor = self.draw(torch.Generator().manual_seed(self.step))
        # FLUX.2's pipelines pack what they are given.
        return noise.flatten(2).transpose(1, 2) if len(shape) == 3 else noise


@pytest.mark.parametrize("solver", ["heun", "sde", "unipc"])
def test_theorem_1_whatever_the_solver(
    architecture: str,
    solver: str,
    model_folders: dict[str, Path],
    converted: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import liftkit
    from liftkit.models import solvers

    latent = load(model_folders[architecture])
    lift = Lift.load(converted[architecture] / "lift.safetensors")
    pixel = exact_twin(latent, lift, converted[architecture])
    for pipeline in (latent, pixel):
        pipeline.scheduler = with_solver(pipeline.scheduler, solver)
    noise = torch.randn(2, 3, 12, 20)
    found = []
    for pipeline, tie in ((latent, lift.lower), (pixel, lambda state: state)):
        flow = liftkit.open_flow(pipeline.transformer)

        def draw(generator: torch.Generator, tie: Any = tie, flow: Any = flow) -> torch.Tensor:
            return flow.pipeline_state(tie(torch.randn(noise.shape, generator=generator)))

        monkeypatch.setattr(solvers, "randn_tensor", Tied(draw))
        found.append(states(architecture, pipeline, tie(noise), num_inference_steps=6))
    # The multistep solver begins at 1 - 1e-6, which float32 knows to some percent.
    assert deviation(lift, found[0], found[1]) < (1e-3 if solver == "unipc" else 1e-4)


@pytest.mark.parametrize("solver", SOLVERS)
def test_another_solver_keeps_shift_scale_and_clamp(solver: str) -> None:
    from liftkit.color import Oklab

    multistep = with_clamp(SOLVERS["unipc"](**schedules.MULTISTEP, flow_shift=3.0, lift_scale=2.0), Oklab().to_dict())
    changed = with_solver(with_solver(multistep, "euler"), solver)
    assert changed.config.lift_scale == 2.0
    assert changed.config.clamp == Oklab().to_dict()
    assert changed.config.get("flow_shift", changed.config.get("shift")) == 3.0
    again = with_shift(changed, 5.0)
    again.set_timesteps(4)
    levels = again.sigmas.unique().flip(0)[1:4]
    assert levels.tolist() == pytest.approx([5 * t / (1 + 4 * t) for t in (0.75, 0.5, 0.25)], abs=1e-5)


def test_the_shift_is_for_a_size_and_grows_with_the_square_root_of_the_pixel_count() -> None:
    sampler = Sampler(shift=17.0, shift_side=1024)
    assert sampler.shift_for(1024, 1024) == 17.0
    assert sampler.shift_for(2048, 2048) == 34.0
    assert sampler.shift_for(512, 2048) == 17.0
    assert Sampler(shift=3.0).shift_for(64, 64) == 3.0
    assert Sampler().shift_for(64, 64) is None


def test_options_hold_for_the_calls_of_a_pipeline_alone(converted: dict[str, Path]) -> None:
    pixel = load(converted["flux2"])
    model, scheduler = Loaded(pixel, 16), pixel.scheduler
    sampler = Sampler(solver="sde", eta=0.25, shift=2.0, shift_side=16, clamp=True, sigma_floor=0.04)
    with pytest.raises(KeyboardInterrupt), walked(model, SampleOptions(sampler=sampler), 32, 32):
        config = pixel.scheduler.config
        assert isinstance(pixel.scheduler, SOLVERS["sde"])
        assert (config.eta, config.pixel_shift) == (0.25, 4.0)
        assert config.clamp == pixel.vae.color.to_dict()
        assert config.lift_scale == scheduler.config.lift_scale
        assert pixel.transformer.lift.sigma_min == 0.04
        raise KeyboardInterrupt
    assert pixel.scheduler is scheduler
    assert pixel.transformer.lift.sigma_min == SIGMA_MIN


def test_a_solver_that_cannot_count_upward() -> None:
    with pytest.raises(UsageError, match="--solver unipc"):
        with_solver(SOLVERS["euler"](invert_sigmas=True, num_train_timesteps=1), "unipc")


def test_the_floor_of_the_recovery_bounds_both_divisions() -> None:
    basis = torch.linalg.qr(torch.randn(12, 4, generator=torch.Generator().manual_seed(0)))[0]
    u_cal, x = torch.randn(2, 1, 5, 12, generator=torch.Generator().manual_seed(1))
    low, floor = torch.tensor([0.01]), 0.04
    outside = torch.eye(12) - basis @ basis.T
    found = recover_velocity(u_cal, x, low, basis, 1.0, floor) @ outside
    assert torch.allclose(found, (x + u_cal) @ outside / floor, atol=1e-5)
    free = recover_velocity(u_cal, x, low, basis, 1.0, SIGMA_MIN) @ outside
    assert torch.allclose(free, (x + u_cal) @ outside / low, atol=1e-4)
