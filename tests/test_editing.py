"""Start images and reference images, for latent models and their pixel twins alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Img2ImgPipeline
from PIL import Image

import liftkit
from liftkit.checkpoint.model import find_model
from liftkit.embedded import TINY_KLEIN
from liftkit.errors import UsageError
from liftkit.lift import Lift
from liftkit.models.editing import check_pictures, size_for
from liftkit.models.loaded import Loaded, load_pipeline
from liftkit.models.sampling import sample
from liftkit.models.scheduler import SOLVERS, with_solver, with_start
from liftkit.options import Pictures, SampleOptions, Sampler
from liftkit.report.saving import read_settings
from tests import tiny
from tests.test_conformance import encode_as_the_twin
from tests.test_pipelines import deviation, exact_twin, load, states

Cli = Callable[..., tuple[int, str, str]]
STEPS = 7


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A smooth picture, 96 x 64."""
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    columns, rows = np.meshgrid(np.linspace(0, 255, 96), np.linspace(0, 255, 64))
    Image.fromarray(np.stack([columns, rows, 255 - columns], 2).astype(np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def klein() -> Loaded:
    """The embedded latent model."""
    return load_pipeline(find_model(str(TINY_KLEIN)))


@pytest.mark.parametrize("strength", [0.3, 0.6, 1.0])
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_a_start_image_is_what_the_stock_pipeline_makes_of_it(
    solver: str, strength: float, model_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of diffusers know the level that they begin at; ours is found on the grid of a pipeline that does not."""
    pipeline = load(model_folders["sd3"])
    pipeline.scheduler = with_solver(pipeline.scheduler, solver)
    generator = torch.Generator().manual_seed(3)
    noise, start = (torch.randn(2, tiny.CHANNELS, 8, 12, generator=generator) for _ in range(2))
    stock = StableDiffusion3Img2ImgPipeline.from_pipe(pipeline)
    module = "diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3_img2img"
    monkeypatch.setattr(f"{module}.randn_tensor", lambda shape, **more: noise)
    theirs = stock(
        **tiny.prompt_arguments("sd3", 2),
        image=start,
        strength=strength,
        num_inference_steps=STEPS,
        guidance_scale=3.0,
        height=8 * tiny.FACTOR,
        width=12 * tiny.FACTOR,
        output_type="latent",
    ).images
    pipeline.scheduler = with_start(pipeline.scheduler, lambda like: start, strength)
    ours = states("sd3", pipeline, noise, num_inference_steps=STEPS)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("solver", ["euler", "heun", "unipc"])
def test_theorem_1_from_a_start_image(
    architecture: str, solver: str, model_folders: dict[str, Path], converted: dict[str, Path]
) -> None:
    """The image is one that both models know: lifted from latents."""
    latent = load(model_folders[architecture])
    lift = Lift.load(converted[architecture] / "lift.safetensors")
    pixel = exact_twin(latent, lift, converted[architecture])
    noise = torch.randn(2, 3, 12, 20)
    tokens = torch.randn(2, 15, lift.rank)
    image = liftkit.unpatchify(lift.raise_tokens(tokens), tiny.PATCH, 12, 20)
    known = liftkit.unpatchify(tokens, tiny.LATENT_PATCH, 6, 10)
    found = []
    for pipeline, state, start in ((latent, known, lift.lower(noise)), (pixel, image, noise)):
        flow = liftkit.open_flow(pipeline.transformer)

        def clean(like: torch.Tensor, flow: Any = flow, state: Any = state) -> torch.Tensor:
            return flow.running_state(state, like)

        pipeline.scheduler = with_start(with_solver(pipeline.scheduler, solver), clean, 0.6)
        found.append(states(architecture, pipeline, start, num_inference_steps=STEPS))
        # Of seven steps five are taken, and one evaluation finds where to begin.
        assert len(pipeline.scheduler.timesteps) == (10 if solver == "heun" else 6)
    assert deviation(lift, found[0], found[1]) < 1e-4


def test_a_step_too_few_still_begins_at_the_image() -> None:
    scheduler = with_start(SOLVERS["euler"](), lambda like: torch.full_like(like, 5.0), 1e-6)
    scheduler.set_timesteps(4)
    state = torch.zeros(1, 3)
    levels = scheduler.sigmas.tolist()
    for time in scheduler.timesteps:
        state = scheduler.step(torch.zeros(1, 3), time, state, return_dict=False)[0]
    assert len(levels) == 3
    assert torch.allclose(state, torch.full((1, 3), 5.0 * (1 - levels[1])))


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 2])
def test_theorem_1_with_reference_images(
    count: int, model_folders: dict[str, Path], converted: dict[str, Path], photo: Path
) -> None:
    """Through FLUX.2's stock pipeline, with a VAE that sees of the references what the lift does."""
    latent = load(model_folders["flux2"])
    lift = Lift.load(converted["flux2"] / "lift.safetensors")
    pixel = exact_twin(latent, lift, converted["flux2"])
    encode_as_the_twin(latent.vae, pixel.transformer.architecture, lift)
    images = [Image.open(photo), Image.open(photo).rotate(90)][:count]
    noise = torch.randn(1, 3, 12, 20)
    z = states("flux2", latent, lift.lower(noise), num_inference_steps=STEPS, image=images)
    x = states("flux2", pixel, noise, num_inference_steps=STEPS, image=images)
    assert deviation(lift, z, x) < 1e-4
    without = states("flux2", pixel, noise, num_inference_steps=STEPS)
    assert (x - without).abs().max() > 1e-2 * x.abs().max(), "the references count"


def test_less_strength_keeps_more_of_the_image(klein: Loaded, photo: Path) -> None:
    found = []
    for strength in (0.1, 0.5, 1.0):
        options = SampleOptions(steps=8, pictures=Pictures(image=photo, strength=strength))
        found.append(sample(klein, ["a red seven"], options))
    shown = torch.from_numpy(np.array(Image.open(photo).resize((80, 56)))).permute(2, 0, 1)[None] / 127.5 - 1
    assert all(each.shape == (1, 3, 56, 80) for each in found), "an image of the same shape, of the model's size"
    distances = [(each - shown).square().mean().item() for each in found]
    assert distances == sorted(distances)
    assert torch.equal(found[2], sample(klein, ["a red seven"], SampleOptions(steps=8, height=56, width=80)))


def test_how_it_is_walked_is_over_with_the_call(klein: Loaded, photo: Path) -> None:
    before = klein.pipeline.scheduler
    assert isinstance(before, FlowMatchEulerDiscreteScheduler)
    options = SampleOptions(
        steps=2, height=32, width=32, sampler=Sampler(solver="heun", shift=2.0), pictures=Pictures(references=(photo,))
    )
    images = sample(klein, ["a red seven", "a red seven"], options, seeds=[4, 4])
    assert torch.equal(images[0], images[1])
    assert klein.pipeline.scheduler is before


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, (64, 96)), ({"height": 32}, (32, 48)), ({"width": 96}, (64, 96)), ({"height": 16, "width": 16}, (16, 16))],
)
def test_what_is_painted_has_the_shape_of_the_picture(
    given: dict[str, int], expected: tuple[int, int], photo: Path
) -> None:
    for pictures in (Pictures(image=photo), Pictures(references=(photo,))):
        assert size_for(SampleOptions(pictures=pictures, **given), 78, 8) == expected
    assert size_for(SampleOptions(), 64, 8) == (64, 64)


def test_a_model_that_takes_no_references_says_so(model_folders: dict[str, Path], photo: Path) -> None:
    folder = find_model(str(model_folders["sd3"]))
    with pytest.raises(UsageError, match=r"StableDiffusion3Pipeline takes no reference images; .*Flux2KleinPipeline"):
        check_pictures(folder, Pictures(references=(photo,)))
    check_pictures(folder, Pictures(image=photo))
    with pytest.raises(UsageError, match="takes at most 10; 11 given"):
        check_pictures(find_model(str(TINY_KLEIN)), Pictures(references=(photo,) * 11))


def test_a_model_that_only_edits_says_what_it_needs(photo: Path) -> None:
    from types import SimpleNamespace

    folder: Any = SimpleNamespace(
        index={"_class_name": "QwenImageEditPipeline"}, class_of=lambda name: "AsymQwenImageTransformer2DModel"
    )
    with pytest.raises(UsageError, match="QwenImageEditPipeline edits pictures: give it one by --reference; 0 given"):
        check_pictures(folder, Pictures())
    check_pictures(folder, Pictures(references=(photo,)))


def test_the_command_line_edits(cli: Cli, photo: Path, tmp_path: Path) -> None:
    output = tmp_path / "grid.png"
    pictures = ("--reference", photo, photo, "--image", photo, "--strength", 0.4)
    size = ("--steps", 2, "--height", 32, "--width", 32)
    more = ("--solver", "heun", "--negative", "gray", "--guidance-high", 0.9)
    code, _, err = cli(
        "sample", "demo", "-p", "a red two", "-n", 1, *pictures, *size, *more, "-o", output, "--device", "cpu"
    )
    assert code == 0, err
    made = read_settings(output)[0]
    assert made["image"] == str(photo)
    assert made["references"] == [str(photo)] * 2
    assert {"strength": 0.4, "solver": "heun", "negative": "gray"}.items() <= made.items()
    assert made["guidance"] == {"scale": None, "high": 0.9}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--image", "TEXT"], "--image TEXT: "),
        (["--image", "MISSING"], "--image MISSING: "),
        (["--reference", "TEXT"], "--reference TEXT: "),
        (["--reference", "SMALL"], "16 x 100 pixels; expected at least 64 a side"),
        (["--image", "PHOTO", "--strength", "0"], "--strength 0: expected a number above 0"),
        (["--image", "PHOTO", "--strength", "1.5"], "--strength"),
        (["--image", "PHOTO", "--strength", "nan"], "--strength"),
        (["--strength", "0.5"], "--strength 0.5: goes with --image"),
        (["--image", "PHOTO", "--height", "33"], "--height 33: not a multiple"),
        (["--clamp"], "--clamp: the model paints latents"),
        (["--sigma-floor", "0.04"], "--sigma-floor: the model paints latents"),
        (["--eta", "1"], "--eta 1: only --solver sde"),
        (["--shift-side", "64"], "--shift-side 64: goes with --shift"),
        (["--shift", "inf"], "--shift"),
    ],
)
def test_what_cannot_be_is_one_line(cli: Cli, flags: list[str], message: str, photo: Path, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    Image.new("RGB", (16, 100)).save(tmp_path / "small.png")
    places = {
        "TEXT": tmp_path / "text.png",
        "MISSING": tmp_path / "missing.png",
        "SMALL": tmp_path / "small.png",
        "PHOTO": photo,
    }
    output = tmp_path / "grid.png"
    code, _, err = cli(
        "sample", "demo", "-p", "a red two", "-n", 1, *(places.get(flag, flag) for flag in flags), "-o", output
    )
    for name, place in places.items():
        message = message.replace(name, str(place))
    assert code == 2
    assert message in err
    assert len([line for line in err.splitlines() if not line.endswith(" ...")]) == 1
    assert not output.exists()
