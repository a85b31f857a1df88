"""Latent spaces: tiny autoencoders as a model's VAE, and a fit through another VAE of the same space."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from safetensors.torch import load_file, save_file

import liftkit
from liftkit.color import to_signed
from liftkit.data import demo
from liftkit.embedded import TINY_FLUX2
from liftkit.finetune.terms import make_perceptual
from liftkit.fit.gallery import psnr
from liftkit.lift import Lift
from liftkit.models.latents import LatentSpace
from liftkit.models.load import load_vae
from liftkit.models.vaes import vae_geometry
from tests import tiny, vaes
from tests.real import flux2_encoder

Cli = Callable[..., tuple[int, str, str]]
WEIGHTS = "diffusion_pytorch_model.safetensors"


def tiny_vae(channels: int = 4, blocks: int = 2, **config: float) -> AutoencoderTiny:
    torch.manual_seed(1)
    widths = dict.fromkeys(("encoder_block_out_channels", "decoder_block_out_channels"), (8,) * blocks)
    numbers = dict.fromkeys(("num_encoder_blocks", "num_decoder_blocks"), (1,) * blocks)
    return AutoencoderTiny(**widths, **numbers, latent_channels=channels, **config).eval()


def sd3_with(vae: torch.nn.Module, folder: Path) -> Path:
    pipeline = tiny.sd3_pipeline()
    pipeline.register_modules(vae=vae)
    return tiny.save(pipeline, folder)


def test_tiny_autoencoder_is_normalized_by_its_config_and_scaled_by_its_class() -> None:
    vae = tiny_vae(scaling_factor=2.0, shift_factor=0.25)
    space = LatentSpace(vae)
    assert (space.factor, space.channels) == (2, 4)
    images = torch.rand(2, 3, 16, 24) * 2 - 1
    latents = space.encode(images)
    with torch.no_grad():
        raw = vae.encoder.layers((images + 1) / 2)
        torch.testing.assert_close(latents, (raw - 0.25) * 2)
        shown = vae.decoder.layers(torch.tanh(raw / 3) * 3) * 2 - 1
    torch.testing.assert_close(space.decode(latents), shown.clamp(-1, 1))


def test_geometry_of_a_saved_tiny_autoencoder(tmp_path: Path) -> None:
    tiny_vae(blocks=4).save_pretrained(tmp_path)
    assert vae_geometry(json.loads((tmp_path / "config.json").read_text())) == (8, 4)


def test_a_model_whose_vae_is_tiny_converts(cli: Cli, tmp_path: Path, image_folder: Path) -> None:
    folder = sd3_with(tiny_vae(), tmp_path / "model")
    code, _, err = cli("convert", folder, "--images", image_folder, "-o", tmp_path / "pixel", "--device", "cpu")
    assert code == 0, err
    kept = load_vae(tmp_path / "pixel" / "latent")
    assert isinstance(kept, AutoencoderTiny)


def test_fit_through_another_vae(cli: Cli, tmp_path: Path, image_folder: Path, model_folders: dict[str, Path]) -> None:
    other = tmp_path / "other"
    tiny_vae().save_pretrained(other)

    def fit(name: str, *more: object) -> Lift:
        target = tmp_path / f"{name}.safetensors"
        code, _, err = cli(
            "fit", model_folders["sd3"], "--images", image_folder, "-o", target, "--device", "cpu", *more
        )
        assert code == 0, err
        return Lift.load(target)

    own, through = fit("own"), fit("through", "--vae", other)
    assert not torch.allclose(own.basis, through.basis)
    assert torch.equal(through.basis, fit("as own", "--vae", sd3_with(tiny_vae(), tmp_path / "whole")).basis)
    assert torch.equal(own.basis, fit("explicit", "--vae", model_folders["sd3"] / "vae").basis)
    pixel = tmp_path / "pixel"
    code, _, err = cli(
        "convert", model_folders["sd3"], "--images", image_folder, "-o", pixel, "--device", "cpu", "--vae", other
    )
    assert code == 0, err
    assert torch.equal(Lift.load(pixel / "lift.safetensors").basis, through.basis)
    assert isinstance(load_vae(pixel / "latent"), AutoencoderKL), "the model keeps its own"
    assert json.loads((pixel / "liftkit.json").read_text())["options"]["vae"] == "other"


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (
            lambda path: tiny_vae(channels=8).save_pretrained(path),
            "8 channels at 1/2 of the image's size, the model's 4",
        ),
        (lambda path: tiny_vae(blocks=4).save_pretrained(path), "4 channels at 1/8"),
        (lambda path: shutil.copytree(TINY_FLUX2 / "vae", path), "32 channels at 1/8"),
        (lambda path: path.mkdir(), "no VAE; give a folder"),
        (lambda path: path.write_bytes(b"taef2"), "no VAE; give a folder"),
        (lambda path: tiny.sd3_transformer().save_pretrained(path), "'SD3Transformer2DModel' is not supported"),
    ],
    ids=["channels", "factor", "TAEF2", "empty", "file", "no VAE"],
)
def test_vaes_of_another_space_are_refused(
    cli: Cli, tmp_path: Path, model_folders: dict[str, Path], make: Callable[[Path], object], expected: str
) -> None:
    make(tmp_path / "other")
    target = tmp_path / "lift.safetensors"
    code, _, err = cli("fit", model_folders["sd3"], "--images", "demo", "--vae", tmp_path / "other", "-o", target)
    assert code == 2
    assert expected in " ".join(err.split())
    assert not target.exists()


def test_a_tiny_autoencoder_with_tensors_of_another_class_is_refused(tmp_path: Path) -> None:
    """diffusers would leave them out without a word, and encode to other latents."""
    tiny_vae().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    save_file({**tensors, "encoder.layers.1.more.weight": torch.zeros(32, 8, 1, 1)}, tmp_path / WEIGHTS)
    with pytest.raises(liftkit.UsageError, match="no place in diffusers' AutoencoderTiny"):
        load_vae(tmp_path)


def test_taef2_saved_as_a_tiny_autoencoder_is_opened_with_its_pooled_blocks(tmp_path: Path) -> None:
    """Weights in that class's layout under its name, as others save them: diffusers alone leaves the blocks out."""
    vae = vaes.small_flux2()
    vae.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "_class_name": "AutoencoderTiny"}))
    images = torch.rand(2, 3, 16, 24) * 2 - 1
    torch.testing.assert_close(LatentSpace(load_vae(tmp_path)).encode(images), LatentSpace(vae).encode(images))
    with torch.no_grad():
        without = AutoencoderTiny.from_pretrained(tmp_path).encode(images).latents
    assert not torch.allclose(without, LatentSpace(vae).encode(images), atol=1e-2)


def test_taef2_reconstructs_pictures() -> None:
    space = LatentSpace(load_vae(Path("taef2")))
    assert (space.factor, space.channels) == (8, 32)
    images = to_signed(torch.from_numpy(demo.images(32, split="heldout")[0].transpose(0, 3, 1, 2).copy()))
    latents = space.encode(images)
    assert 0.8 < latents.std() < 1.0, "normalized, but for what a distilled encoder leaves out"
    assert psnr(space.decode(latents), images).mean() > 24.0  # 25.0 over 256 of them


def test_taef2_encodes_as_its_network_built_from_its_keys() -> None:
    encoder = flux2_encoder()
    images = torch.rand(2, 3, 32, 48) * 2 - 1
    torch.testing.assert_close(LatentSpace(load_vae(Path("taef2"))).encode(images), encoder.encode(images))


def test_features_of_a_tiny_autoencoder() -> None:
    distance = make_perceptual("vae", tiny_vae(blocks=3), "cpu")
    assert distance is not None
    target = torch.rand(2, 3, 16, 24) * 2 - 1
    images = (target + 0.1 * torch.randn_like(target)).requires_grad_()
    far = distance(images, target)
    assert far.shape == (2, 1, 16, 24)
    assert far.mean() > distance(target, target).mean() == 0
    far.mean().backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0


def test_features_of_a_vae_without_stages_are_refused() -> None:
    with pytest.raises(liftkit.UsageError, match="neither down blocks nor a list of layers"):
        make_perceptual("vae", SimpleNamespace(encoder=torch.nn.Identity()), "cpu")
