"""Noise levels and gamut of models that have a grid of their own, as the authors sample AsymFLUX.2."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

from liftkit.color import SRGB, Oklab
from liftkit.errors import UsageError
from liftkit.formats.asymflow_adapter import SAMPLING
from liftkit.models import scheduler as schedules
from liftkit.models.scheduler import authors_config, tokens_of, with_clamp, with_shift


def theirs() -> schedules.LiftedScheduleMixin:
    config = authors_config(SAMPLING, 2.4375, 16, Oklab())
    return getattr(schedules, config["_class_name"]).from_config(config)


@pytest.mark.parametrize("steps", [8, 38, 50])
@pytest.mark.parametrize("side", [512, 1024, 1360, 1440, 2048])
def test_the_shift_grows_with_the_square_root_of_the_pixel_count(side: int, steps: int) -> None:
    scheduler = theirs()
    mu = compute_empirical_mu((side // 16) ** 2, steps)
    scheduler.set_timesteps(steps, device="cpu", mu=mu)
    shift = 17.0 * side / 1024
    even = np.linspace(1.0, 0.0, steps, endpoint=False)
    expected = shift * even / (1 + (shift - 1) * even)
    assert np.allclose(scheduler.timesteps.numpy() / 1000, expected, atol=1e-6)
    assert scheduler.sigmas[0] == pytest.approx(1 - 1e-4)
    assert np.allclose(scheduler.sigmas.numpy()[1:-1], expected[1:], atol=1e-6)
    assert scheduler.sigmas[-1] == 0


def test_the_number_of_tokens_is_given_exactly_or_not_at_all() -> None:
    for steps in (1, 4, 38, 199):
        for tokens in (1, 17, 4096, 4300, 4301, 6000, 8100, 16384):
            assert tokens_of(compute_empirical_mu(tokens, steps), steps) == tokens
    assert tokens_of(math.pi, 38) is None


def test_a_shift_by_hand_is_the_same_for_all_sizes() -> None:
    scheduler = with_shift(theirs(), 5.0)
    for side in (32, 64):
        scheduler.set_timesteps(10, mu=compute_empirical_mu(side**2, 10))
        assert float(scheduler.timesteps[5]) == pytest.approx(1000 * 5 * 0.5 / (1 + 4 * 0.5), abs=1e-3)
    stock = schedules.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    changed = with_shift(stock, 5.0)
    changed.set_timesteps(10)
    assert changed.config.shift == 5.0
    with pytest.raises(UsageError, match="has none"):
        from diffusers import DDIMScheduler

        with_shift(DDIMScheduler(), 5.0)


@pytest.mark.parametrize("color", [Oklab(), SRGB()])
@pytest.mark.parametrize("layout", ["tokens", "image"])
@pytest.mark.parametrize("name", ["AsymFlowMatchEulerDiscreteScheduler", "AsymUniPCMultistepScheduler"])
def test_the_denoised_estimate_stays_in_the_gamut(color: Oklab, layout: str, name: str) -> None:
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True} if "UniPC" in name else {}
    scheduler = with_clamp(getattr(schedules, name)(lift_scale=2.0, **flow), color.to_dict())
    scheduler.set_timesteps(1)
    generator = torch.Generator().manual_seed(0)
    folded = (2, 3 * 4, 2, 3) if layout == "image" else (2, 6, 3 * 16)
    state, velocity = (3 * torch.randn(folded, generator=generator) for _ in range(2))
    final = scheduler.step(velocity, scheduler.timesteps[0], state, return_dict=False)[0]
    colors = final.reshape(2, 3, -1, 3) if layout == "image" else final.unflatten(2, (3, -1)).transpose(1, 2)
    assert torch.allclose(color.encode(color.decode(colors)), colors, atol=1e-3)
    free = with_clamp(scheduler, None)
    free.set_timesteps(1)
    assert not torch.allclose(free.step(velocity, free.timesteps[0], state, return_dict=False)[0], final, atol=0.1)


@pytest.mark.parametrize("shift", [None, 5.0])
def test_a_grid_that_counts_upward_steps_as_the_one_that_counts_downward(shift: float | None) -> None:
    """OmniGen's: 1 - sigma, a time of the same, and a velocity of the other sign."""
    more = {"lift_scale": 1.7, "pixel_shift": shift, "clamp": Oklab().to_dict()}
    down, up = (
        schedules.AsymFlowMatchEulerDiscreteScheduler(**more, **other)
        for other in ({}, {"invert_sigmas": True, "num_train_timesteps": 1})
    )
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(2, 12, 2, 3, generator=generator)] * 2
    levels = list(np.linspace(1.0, 0.0, 5)[:-1])
    for scheduler in (down, up):
        scheduler.set_timesteps(sigmas=levels)
    for step, (t_down, t_up) in enumerate(zip(down.timesteps, up.timesteps)):
        assert schedules.noise_level(up, step) == pytest.approx(schedules.noise_level(down, step), abs=1e-6)
        assert float(t_up) == pytest.approx(1 - float(t_down) / 1000, abs=1e-6)
        velocity = torch.randn(2, 12, 2, 3, generator=generator)
        states = [
            scheduler.step(sign * velocity, t, state, return_dict=False)[0]
            for scheduler, sign, t, state in zip((down, up), (1, -1), (t_down, t_up), states)
        ]
        assert torch.allclose(*states, atol=1e-5)
    assert schedules.noise_level(up, 4) == 0


def test_configs_survive_saving(tmp_path: object) -> None:
    theirs().save_pretrained(tmp_path)
    again = schedules.AsymUniPCMultistepScheduler.from_pretrained(tmp_path)
    assert again.config.pixel_shift == 17.0
    assert again.config.clamp == Oklab().to_dict()
