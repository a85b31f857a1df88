"""Theorem 1 through the stock pipelines with guidance, and the ways in which a converted folder is loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

import liftkit
from liftkit.lift import Lift
from liftkit.models.scheduler import AsymUniPCMultistepScheduler
from tests import tiny

ROOT = Path(__file__).parents[1]


def load(folder: Path, **choices: Any) -> Any:
    kind = "sd3" if "Diffusion3" in (folder / "model_index.json").read_text() else "flux2"
    pipeline = DiffusionPipeline.from_pretrained(folder, **dict.fromkeys(tiny.TEXT_SIDE[kind]), **choices)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def exact_twin(latent: Any, lift: Lift, folder: Path) -> Any:
    """A converted pipeline whose projections are not rounded and whose lift is given."""
    pixel = load(folder)
    pixel.register_modules(transformer=liftkit.convert_transformer(latent.transformer, lift))
    return pixel


def states(name: str, pipeline: Any, noise: torch.Tensor, **choices: Any) -> torch.Tensor:
    """The final state of a stock pipeline run, image-shaped."""
    flow = liftkit.open_flow(pipeline.transformer)
    height, width = noise.shape[-2:]
    factor = 1 if flow.is_pixel else tiny.FACTOR
    output = pipeline(
        **tiny.prompt_arguments(name, len(noise)),
        latents=flow.pipeline_state(noise),
        height=height * factor,
        width=width * factor,
        guidance_scale=3.0,
        output_type="latent",
        **choices,
    ).images
    if name == "flux2" and not flow.is_pixel:
        # The pipeline hands out latents after undoing the batch norm.
        mean, std = pipeline.vae.bn.running_mean, pipeline.vae.bn.running_var + pipeline.vae.config.batch_norm_eps
        folded = torch.nn.functional.pixel_unshuffle(output, 2)
        folded = (folded - mean.view(1, -1, 1, 1)) / std.sqrt().view(1, -1, 1, 1)
        output = torch.nn.functional.pixel_shuffle(folded, 2)
    return torch.nn.functional.pixel_shuffle(output, tiny.FACTOR) if flow.is_pixel else output


def deviation(lift: Lift, latent: torch.Tensor, pixel: torch.Tensor) -> float:
    height, width = pixel.shape[-2:]
    lifted = liftkit.unpatchify(lift.raise_tokens(liftkit.patchify(latent, 2)), tiny.PATCH, height, width)
    return ((pixel - lifted).abs().max() / lifted.abs().max()).item()


@pytest.mark.parametrize("size", [(16, 16), (12, 20)], ids=["square", "wide"])
@pytest.mark.parametrize("shifting", ["static", "dynamic"])
def test_theorem_1_through_the_stock_pipeline(
    architecture: str, size: tuple[int, int], shifting: str, model_folders: dict[str, Path], converted: dict[str, Path]
) -> None:
    latent = load(model_folders[architecture])
    lift = Lift.load(converted[architecture] / "lift.safetensors")
    pixel = exact_twin(latent, lift, converted[architecture])
    if shifting == "dynamic":
        for pipeline in (latent, pixel):
            config = {**pipeline.scheduler.config, "use_dynamic_shifting": True, "shift_terminal": 0.02}
            pipeline.scheduler = type(pipeline.scheduler).from_config(config)
    noise = torch.randn(2, 3, *size)
    z = states(architecture, latent, lift.lower(noise), num_inference_steps=6)
    x = states(architecture, pixel, noise, num_inference_steps=6)
    assert deviation(lift, z, x) < 1e-4


def test_theorem_1_with_unipc(model_folders: dict[str, Path], converted: dict[str, Path]) -> None:
    """A data-prediction multistep solver: log((1 - sigma) / sigma) shifts by the constant log s.

    The stock class tells the network a rounded time; ours with scale 1 is the stock solver that does not.
    """
    latent = load(model_folders["flux2"])
    lift = Lift.load(converted["flux2"] / "lift.safetensors")
    pixel = exact_twin(latent, lift, converted["flux2"])
    for pipeline, scale in ((latent, 1.0), (pixel, lift.scale)):
        config = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 2.0, "lift_scale": scale}
        pipeline.scheduler = AsymUniPCMultistepScheduler.from_config(config)
    noise = torch.randn(1, 3, 12, 20)
    z = states("flux2", latent, lift.lower(noise), num_inference_steps=8)
    x = states("flux2", pixel, noise, num_inference_steps=8)
    assert deviation(lift, z, x) < 1e-4


def test_the_schedule_matters(model_folders: dict[str, Path], converted: dict[str, Path]) -> None:
    """With the latent model's own scheduler the pixel samples are others: the shift times s is not decoration."""
    latent = load(model_folders["flux2"])
    lift = Lift.load(converted["flux2"] / "lift.safetensors")
    pixel = exact_twin(latent, lift, converted["flux2"])
    pixel.scheduler = latent.scheduler
    noise = torch.randn(1, 3, 12, 12)
    z = states("flux2", latent, lift.lower(noise), num_inference_steps=6)
    assert deviation(lift, z, states("flux2", pixel, noise, num_inference_steps=6)) > 1e-3


def test_a_static_shift_is_multiplied_by_s() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    from liftkit.models.scheduler import AsymFlowMatchEulerDiscreteScheduler

    lifted = AsymFlowMatchEulerDiscreteScheduler(shift=3.0, lift_scale=2.5)
    stock = FlowMatchEulerDiscreteScheduler(shift=7.5)
    sigmas = torch.linspace(1, 0.1, 10).tolist()
    for scheduler in (lifted, stock):
        scheduler.set_timesteps(sigmas=sigmas)
    torch.testing.assert_close(lifted.sigmas, stock.sigmas)
    torch.testing.assert_close(lifted.timesteps, stock.timesteps)
    again = AsymFlowMatchEulerDiscreteScheduler.from_config(lifted.config)
    assert again.config.lift_scale == 2.5


def test_pictures_come_out(architecture: str, converted: dict[str, Path]) -> None:
    pipeline = load(converted[architecture])
    output = pipeline(**tiny.prompt_arguments(architecture), height=12, width=20, num_inference_steps=2)
    assert output.images[0].size == (20, 12)


def test_image_editing_runs_unmodified(converted: dict[str, Path]) -> None:
    from PIL import Image

    pipeline = load(converted["flux2"])
    arguments = tiny.prompt_arguments("flux2")
    image = Image.new("RGB", (16, 16), "orange")
    # The stock image processor refuses pictures below 64 pixels a side; references may be larger than the output.
    output = pipeline(image=image.resize((64, 64)), **arguments, height=16, width=16, num_inference_steps=2)
    assert output.images[0].size == (16, 16)


def test_autoencoder_is_lossless_and_looks_like_a_vae(architecture: str, converted: dict[str, Path]) -> None:
    pipeline = load(converted[architecture])
    images = torch.rand(2, 3, 12, 20) * 2 - 1
    code = pipeline.vae.encode(images).latent_dist
    assert code.mode().shape == (2, 3 * tiny.FACTOR**2, 6, 10)
    assert torch.equal(code.sample(), code.mode())
    torch.testing.assert_close(pipeline.vae.decode(code.mode()).sample, images, atol=2e-5, rtol=0)
    assert pipeline.vae_scale_factor == tiny.FACTOR
    with pytest.raises(ValueError, match="power of two"):
        liftkit.PixelAutoencoder(fold=3)


@pytest.mark.filterwarnings("ignore:.*dtype.*")
def test_bf16_pipeline(converted: dict[str, Path]) -> None:
    pipeline = load(converted["flux2"], dtype=torch.bfloat16)
    assert pipeline.transformer.dtype == torch.bfloat16
    assert pipeline.transformer.lift.basis.dtype == torch.float32
    arguments = {key: value.bfloat16() for key, value in tiny.prompt_arguments("flux2").items()}
    images = pipeline(**arguments, height=16, width=16, num_inference_steps=2, output_type="pt").images
    assert torch.isfinite(images).all()


LOADERS = {
    "import liftkit first": "import liftkit\nfrom diffusers import DiffusionPipeline",
    "import liftkit last": "from diffusers import DiffusionPipeline\nimport liftkit",
    "custom pipeline": "from diffusers import DiffusionPipeline\n"
    "choices = {'custom_pipeline': folder, 'trust_remote_code': True}",
}


@pytest.mark.parametrize("how", sorted(LOADERS))
def test_loads_in_a_fresh_process(how: str, converted: dict[str, Path]) -> None:
    folder = str(converted["flux2"])
    program = f"""
folder, choices, none = {folder!r}, {{}}, {{"text_encoder": None, "tokenizer": None}}
{LOADERS[how]}
pipe = DiffusionPipeline.from_pretrained(folder, **none, **choices)
print(type(pipe).__name__, type(pipe.transformer).__name__, type(pipe.vae).__name__, type(pipe.scheduler).__name__)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    names = done.stdout.split()
    assert names == [
        "Flux2KleinPipeline",
        "AsymFlux2Transformer2DModel",
        "PixelAutoencoder",
        "AsymFlowMatchEulerDiscreteScheduler",
    ]


def test_saves_again_where_nobody_imported_liftkit(converted: dict[str, Path], tmp_path: Path) -> None:
    program = f"""
from diffusers import DiffusionPipeline
none = {{"text_encoder": None, "tokenizer": None}}
choices = dict(custom_pipeline={str(converted["flux2"])!r}, trust_remote_code=True)
DiffusionPipeline.from_pretrained({str(converted["flux2"])!r}, **none, **choices).save_pretrained({str(tmp_path)!r})
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert type(load(tmp_path)).__name__ == "Flux2KleinPipeline"


def test_without_liftkit_loading_fails_loudly(converted: dict[str, Path]) -> None:
    program = (
        "from diffusers import DiffusionPipeline, Flux2Transformer2DModel\n"
        f"for load in (lambda: DiffusionPipeline.from_pretrained({str(converted['flux2'])!r}, text_encoder=None, tokenizer=None),\n"
        f"             lambda: Flux2Transformer2DModel.from_pretrained({str(converted['flux2'] / 'transformer')!r})):\n"
        "    try:\n        load()\n    except Exception:\n        continue\n"
        "    raise SystemExit('loaded silently')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_saves_again(converted: dict[str, Path], tmp_path: Path) -> None:
    """What diffusers saves of a converted pipeline loads again."""
    pipeline = load(converted["sd3"])
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    exported = json.loads((converted["sd3"] / "model_index.json").read_text())
    parts = ("transformer", "vae", "scheduler")
    assert {part: index[part] for part in parts} == {part: exported[part] for part in parts}
    again = load(tmp_path)
    for key, value in pipeline.transformer.state_dict().items():
        assert torch.equal(again.transformer.state_dict()[key], value)


def test_stock_inpainting_of_sd3_runs_on_pixels() -> None:
    """The stock pipeline asks for 16 latent channels; what its mask keeps comes back as it was."""
    from diffusers import StableDiffusion3InpaintPipeline
    from PIL import Image

    transformer = tiny.sd3_transformer(in_channels=16, out_channels=16)
    basis = torch.linalg.qr(torch.randn(192, 64, dtype=torch.float64))[0]
    lift = Lift(basis, 1.5, patch_size=8, latent_patch=2)
    pixel = liftkit.convert_transformer(transformer, lift)
    pipeline = StableDiffusion3InpaintPipeline(
        scheduler=liftkit.AsymFlowMatchEulerDiscreteScheduler(shift=3.0, lift_scale=lift.scale),
        vae=liftkit.PixelAutoencoder.from_lift(lift, sample_size=32),
        transformer=pixel,
        **dict.fromkeys(tiny.TEXT_SIDE["sd3"]),
    )
    pipeline.set_progress_bar_config(disable=True)
    image, keep = Image.new("RGB", (32, 32), (200, 90, 30)), Image.new("L", (32, 32), 0)
    keep.paste(255, (16, 0, 32, 32))
    choices = {"height": 32, "width": 32, "num_inference_steps": 3, "output_type": "pt"}
    images = pipeline(**tiny.prompt_arguments("sd3"), image=image, mask_image=keep, strength=1.0, **choices).images
    kept = images[0, :, :, :16] * 255
    torch.testing.assert_close(kept, torch.tensor([200.0, 90.0, 30.0]).view(3, 1, 1).expand_as(kept), atol=2.0, rtol=0)
    assert pixel.config.in_channels == 48


def test_one_pipeline_becomes_another(converted: dict[str, Path]) -> None:
    """``from_pipe`` compares exact types; our twins stand for their stock classes."""
    from diffusers import Flux2KleinPipeline, StableDiffusion3Img2ImgPipeline

    for name, kind in (("flux2", Flux2KleinPipeline), ("sd3", StableDiffusion3Img2ImgPipeline)):
        pipeline = load(converted[name])
        other = kind.from_pipe(pipeline)
        assert type(other) is kind
        assert other.transformer is pipeline.transformer
        assert other.vae is pipeline.vae


def test_loads_without_low_memory(converted: dict[str, Path]) -> None:
    pipeline = load(converted["flux2"], low_cpu_mem_usage=False, dtype=torch.bfloat16)
    assert pipeline.transformer.dtype == torch.bfloat16
    assert pipeline.transformer.lift.basis.dtype == torch.float32


def test_diffusers_has_nothing_to_say(converted: dict[str, Path]) -> None:
    """No warning at loading, casting and sampling of a converted folder in a user's own script."""
    program = f"""
import liftkit, torch
from diffusers import DiffusionPipeline
from tests import tiny
pipe = DiffusionPipeline.from_pretrained({str(converted["flux2"])!r}, text_encoder=None, tokenizer=None)
pipe.set_progress_bar_config(disable=True)
pipe.to(torch.bfloat16)
pipe.transformer.to(torch.float32); pipe.vae.to(torch.float32)
pipe(**tiny.prompt_arguments("flux2"), height=16, width=16, num_inference_steps=2)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    # The bar of the loading, and transformers' advice to install torchvision, come with any model.
    others = ("components...", "requires torchvision")
    assert [
        line for line in done.stderr.splitlines() if line.strip() and not any(other in line for other in others)
    ] == []
