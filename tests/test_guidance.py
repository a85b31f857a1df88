"""Guidance at some steps alone and without its parallel part, through the stock pipelines."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import liftkit
from liftkit.asymflow import calibrate
from liftkit.errors import UsageError
from liftkit.lift import Lift
from liftkit.models.guidance import guided
from liftkit.options import Guidance
from tests import tiny
from tests.test_pipelines import deviation, exact_twin, load, states

Cli = Callable[..., tuple[int, str, str]]

STEPS, SCALE = 6, 3.0
"""As :func:`states` samples."""
CHOICES = {
    "nowhere": Guidance(SCALE, stop=0.0),
    "late": Guidance(SCALE, start=0.34),
    "early, orthogonal": Guidance(SCALE, stop=0.5, orthogonal=1.0),
    "orthogonal": Guidance(SCALE, orthogonal=1.0),
    "levels, half orthogonal": Guidance(SCALE, low=0.31, high=0.77, orthogonal=0.5),
}
each_guidance = pytest.mark.parametrize("guidance", CHOICES.values(), ids=CHOICES)


def sampled(name: str, pipeline: Any, noise: torch.Tensor, guidance: Guidance) -> torch.Tensor:
    with guided(pipeline, guidance):
        return states(name, pipeline, noise, num_inference_steps=STEPS)


def by_hand(name: str, pipeline: Any, noise: torch.Tensor, guidance: Guidance) -> torch.Tensor:
    """Euler's method on denoised estimates, with both predictions at every step."""
    flow = liftkit.open_flow(pipeline.transformer)
    prompts = tiny.prompt_arguments(name, len(noise))

    def conditioning(prefix: str) -> dict[str, torch.Tensor]:
        found = {"encoder_hidden_states": prompts[f"{prefix}prompt_embeds"]}
        if name == "sd3":
            found["pooled_projections"] = prompts[f"{prefix}pooled_prompt_embeds"]
        return found

    x, grid = noise, pipeline.scheduler.sigmas.tolist()
    for step, (now, after) in enumerate(zip(grid[:-1], grid[1:])):
        sigma = torch.full((len(x),), now)
        denoised = x - now * flow.velocity(x, sigma, **conditioning(""))
        push = denoised - (x - now * flow.velocity(x, sigma, **conditioning("negative_")))
        if guidance.orthogonal:
            for d, x_0 in zip(push, denoised):
                unit = x_0 / x_0.norm()
                d -= guidance.orthogonal * (d * unit).sum() * unit
        told = float(calibrate(sigma, pipeline.transformer.config.get("lift_scale", 1.0))[1][0])
        if guidance.low <= told <= guidance.high and math.floor(guidance.start * STEPS) <= step < math.floor(
            guidance.stop * STEPS
        ):
            denoised = denoised + (SCALE - 1.0) * push
        x = x + (after - now) * (x - denoised) / now
    return x


@torch.no_grad()
@each_guidance
def test_the_stock_pipeline_samples_as_by_hand(
    architecture: str, guidance: Guidance, converted: dict[str, Path]
) -> None:
    pixel = load(converted[architecture])
    noise = torch.randn(2, 3, 16, 16)
    found = sampled(architecture, pixel, noise, guidance)
    expected = by_hand(architecture, pixel, noise, guidance)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    plain = states(architecture, pixel, noise, num_inference_steps=STEPS)
    assert (found - plain).abs().max() > 1e-2 * expected.abs().max()


@each_guidance
def test_theorem_1_however_the_pipeline_is_guided(
    architecture: str, guidance: Guidance, model_folders: dict[str, Path], converted: dict[str, Path]
) -> None:
    latent = load(model_folders[architecture])
    lift = Lift.load(converted[architecture] / "lift.safetensors")
    pixel = exact_twin(latent, lift, converted[architecture])
    noise = torch.randn(2, 3, 16, 16)
    z = sampled(architecture, latent, lift.lower(noise), guidance)
    assert deviation(lift, z, sampled(architecture, pixel, noise, guidance)) < 1e-4


def test_steps_without_guidance_ask_for_one_prediction(
    converted: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pixel = load(converted["flux2"])
    calls, forward = [], type(pixel.transformer).forward

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(pixel.transformer), "forward", counted)
    sampled("flux2", pixel, torch.randn(1, 3, 16, 16), CHOICES["late"])
    assert len(calls) == 2 + 2 * (STEPS - 2)


def test_a_model_may_have_its_own_way_to_be_guided(converted: dict[str, Path]) -> None:
    pixel, noise = load(converted["flux2"]), torch.randn(1, 3, 16, 16)
    plain, wanted = (sampled("flux2", pixel, noise, Guidance(SCALE, orthogonal=each)) for each in (0.0, 1.0))
    pixel.scheduler = type(pixel.scheduler).from_config(pixel.scheduler.config, guidance_orthogonal=1.0)
    assert torch.equal(sampled("flux2", pixel, noise, Guidance(SCALE)), wanted)
    assert torch.equal(sampled("flux2", pixel, noise, Guidance(SCALE, orthogonal=0.0)), plain)
    assert not torch.equal(plain, wanted)
    with guided(pixel, Guidance()):
        pixel(**arguments("flux2", pixel, guidance_scale=1.0))


def arguments(name: str, pipeline: Any, **choices: Any) -> dict[str, Any]:
    size = {"height": 16, "width": 16, "output_type": "latent"}
    latents = liftkit.open_flow(pipeline.transformer).pipeline_state(torch.randn(2, 3, 16, 16))
    return {**tiny.prompt_arguments(name, 2), **size, "latents": latents, "num_inference_steps": STEPS, **choices}


def test_a_pipeline_that_does_not_guide_is_refused(architecture: str, converted: dict[str, Path]) -> None:
    pixel = load(converted[architecture])
    with pytest.raises(UsageError, match="would do nothing; leave them out"), guided(pixel, CHOICES["late"]):
        pixel(**arguments(architecture, pixel, guidance_scale=1.0))


def test_a_pipeline_without_unconditional_predictions_is_refused(converted: dict[str, Path]) -> None:
    """FLUX.2 dev's is told its guidance, and has no such property."""
    transformer = load(converted["flux2"]).transformer
    told = type("Flux2Pipeline", (), {"transformer": transformer})()
    with pytest.raises(UsageError, match="Flux2Pipeline asks for no unconditional"), guided(told, CHOICES["late"]):
        transformer(hidden_states=None)


def test_skipped_layers_are_a_term_of_their_own(converted: dict[str, Path]) -> None:
    """SD3 asks a third time for them, of as many samples as there are prompts: these answers are left alone."""
    pixel, asked = load(converted["sd3"]), []
    forward = pixel.transformer.forward

    def kept(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        asked.append((kwargs, output[0]))
        return output

    pixel.transformer.forward = kept
    given = arguments("sd3", pixel, guidance_scale=SCALE, skip_guidance_layers=[0], skip_layer_guidance_stop=1.0)
    with guided(pixel, CHOICES["nowhere"]):
        pixel(**given)
        kwargs, answer = next(entry for entry in asked if entry[0].get("skip_layers"))
        assert len(answer) == 2
        assert not torch.equal(answer[0], answer[1])
        with torch.no_grad():
            assert torch.equal(pixel.transformer(**kwargs)[0], answer)


def test_reference_images_have_no_part_in_the_projection(converted: dict[str, Path]) -> None:
    """The difference that is left is orthogonal to what is painted, whatever stands beside it."""
    from PIL import Image

    pixel, answers = load(converted["flux2"]), []
    forward = pixel.transformer.forward

    def kept(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        answers.append((kwargs["hidden_states"], output[0]))
        return output

    pixel.transformer.forward = kept
    given = arguments("flux2", pixel, guidance_scale=SCALE, num_inference_steps=1)
    painted = given["latents"].shape[-2] * given["latents"].shape[-1]
    solve = pixel.scheduler.step
    seen: list[torch.Tensor] = []
    pixel.scheduler.step = lambda prediction, *args, **kwargs: (
        seen.append(prediction) or solve(prediction, *args, **kwargs)
    )
    with guided(pixel, Guidance(SCALE, orthogonal=1.0)):
        pixel(**given, image=Image.new("RGB", (64, 64), (200, 40, 90)))
    (state, conditional), _ = answers
    assert state.shape[1] > painted
    denoised = (state - conditional)[:, :painted]  # sigma is 1
    push = conditional[:, :painted] - seen[0]
    cosine = torch.nn.functional.cosine_similarity(push.flatten(1), denoised.flatten(1))
    assert push.abs().max() > 1e-3
    assert cosine.abs().max() < 1e-4


def test_image_to_image_counts_from_where_it_begins() -> None:
    scheduler = type("Scheduler", (), {"step_index": None, "begin_index": 3})()
    pipeline = type(
        "Pipeline", (), {"scheduler": scheduler, "transformer": tiny.TRANSFORMERS["SD3Transformer2DModel"]()}
    )()
    with guided(pipeline, CHOICES["late"]):
        assert pipeline.transformer.forward._step == 3
        scheduler.step_index = 4
        assert pipeline.transformer.forward._step == 4


@pytest.mark.parametrize("hooked", [False, True], ids=["bare", "with a hook"])
def test_the_transformer_is_as_it_was_afterwards(converted: dict[str, Path], hooked: bool) -> None:
    transformer = load(converted["flux2"]).transformer
    hook: Callable[..., Any] = lambda *args, **kwargs: None
    if hooked:
        transformer.forward = hook
    pipeline = type("Pipeline", (), {"transformer": transformer})()
    with pytest.raises(KeyboardInterrupt), guided(pipeline, CHOICES["late"]):
        assert transformer.forward is not hook
        raise KeyboardInterrupt
    assert transformer.__dict__.get("forward") is (hook if hooked else None)


@pytest.mark.parametrize("ends", [("start", "stop"), ("low", "high")])
@pytest.mark.parametrize("interval", [(0.5, 0.4), (-0.1, 1.0), (0.0, 1.1), (float("nan"), 1.0)])
def test_no_interval(ends: tuple[str, str], interval: tuple[float, float]) -> None:
    with pytest.raises(UsageError, match="no interval in 0 to 1"):
        Guidance(**dict(zip(ends, interval)))


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan")])
def test_no_share_of_the_parallel_part(strength: float) -> None:
    with pytest.raises(UsageError, match="--guidance-orthogonal"):
        Guidance(orthogonal=strength)


def test_both_ends_of_an_interval_of_levels_are_included(converted: dict[str, Path]) -> None:
    """Of 50 even steps and a highest level of 0.88 the seventh is the first guided one, in both evaluations of Heun."""
    from liftkit.models.guidance import _Guided
    from liftkit.models.scheduler import SOLVERS

    pixel = load(converted["sd3"])
    pixel.scheduler = SOLVERS["heun"](lift_scale=pixel.transformer.config.lift_scale)
    pixel.scheduler.set_timesteps(sigmas=torch.linspace(1.0, 0.0, 51)[:-1].tolist())
    guide = _Guided(Guidance(SCALE, high=0.88, low=0.02), pixel, {})
    wanted = []
    for index in range(99):
        pixel.scheduler.set_begin_index(index)
        wanted.append(guide._wanted())
    # Evaluations 2 k - 1 and 2 k are at level 1 - k / 50.
    assert wanted == [index >= 11 for index in range(99)]


def test_the_command_line_says_what_is_no_interval(cli: Cli, tmp_path: Path) -> None:
    output = tmp_path / "grid.png"
    code, _, err = cli(
        "sample", "demo", "-p", "a red two", "--guidance-start", 0.5, "--guidance-stop", 0.2, "-o", output
    )
    assert code == 2
    assert len([line for line in err.splitlines() if not line.endswith(" ...")]) == 1
    assert "--guidance-start" in err
    assert not output.exists()


def test_a_record_says_what_was_chosen() -> None:
    assert Guidance().record is None
    assert Guidance(4.0).record == 4.0
    assert Guidance(4.0, start=0.5).record == {"scale": 4.0, "start": 0.5}
