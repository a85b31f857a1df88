"""Families of VAEs: geometry, statistics, videos and opacity of each class, and the pixel autoencoder in its place."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLWan

import liftkit
from liftkit.models.autoencoder import PixelAutoencoder
from liftkit.models.latents import LatentSpace
from liftkit.models.vaes import FAMILIES, BatchNorm, vae_geometry
from tests import vaes
from tests.real import sana_encoder
from tests.zoo import ZOO

TINY: dict[str, tuple[Callable[[], Any], int]] = {
    "AutoencoderKL": (vaes.kl, 2),
    "AutoencoderKLFlux2": (vaes.flux2, 2),
    "AutoencoderTiny": (vaes.small, 2),
    "AutoencoderTinyFlux2": (vaes.small_flux2, 2),
    "AutoencoderDC": (vaes.dc, 4),
    "AutoencoderKLHunyuanImage": (vaes.hunyuan, 4),
    "AutoencoderKLQwenImage": (vaes.qwen, 2),
    "AutoencoderKLQwenImage21": (vaes.qwen21, 16),
    "AutoencoderKLWan": (vaes.wan, 8),
}


def raw(vae: Any, images: torch.Tensor) -> torch.Tensor:
    """The code as the class gives it, written out here once more."""
    name = type(vae).__name__
    if name in ("AutoencoderKLQwenImage", "AutoencoderKLWan"):
        return vae.encode(images[:, :, None]).latent_dist.mode()[:, :, 0]
    if name == "AutoencoderKLQwenImage21":
        opaque = torch.cat([images, torch.ones_like(images[:, :1])], dim=1)
        return vae.encode(opaque[:, :, None]).latent_dist.mode()[:, :, 0]
    code = vae.encode(images)
    given = {"AutoencoderDC": "latent", "AutoencoderTiny": "latents", "AutoencoderTinyFlux2": "latents"}.get(name)
    return getattr(code, given) if given else code.latent_dist.mode()


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_encodes_to_normalized_latents_and_back(name: str, tmp_path: Path) -> None:
    made, factor = TINY[name]
    vae = made()
    vae.save_pretrained(tmp_path)
    assert vae_geometry(json.loads((tmp_path / "config.json").read_text())) == (factor, 4)
    space = LatentSpace(vae)
    images = torch.rand(2, 3, 2 * 16, 3 * 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = space.encode(images)
    assert latents.shape == (2, 4, 32 // factor, 48 // factor)
    with torch.no_grad():
        code = raw(vae, images)
        if name in ("AutoencoderKL", "AutoencoderDC", "AutoencoderKLHunyuanImage") or "Tiny" in name:
            shift = vae.config.get("shift_factor") or 0.0
            expected = (code - shift) * vae.config.scaling_factor
        elif name == "AutoencoderKLFlux2":  # as its pipeline does it, on packed tokens
            packed = torch.nn.functional.pixel_unshuffle(code, 2)
            mean, variance = (each.view(1, -1, 1, 1) for each in (vae.bn.running_mean, vae.bn.running_var))
            expected = torch.nn.functional.pixel_shuffle((packed - mean) / (variance + 1e-4).sqrt(), 2)
        else:
            mean, std = (torch.tensor(each).view(1, -1, 1, 1) for each in (vaes.MEAN, vaes.STD))
            expected = (code - mean) / std
    torch.testing.assert_close(latents, expected)
    again = space.decode(latents)
    assert again.shape == images.shape
    with torch.no_grad():
        decoded = vae.decode(code[:, :, None] if space.family.video else code).sample
    torch.testing.assert_close(
        again, (decoded[:, :, 0] if space.family.video else decoded)[:, :3].clamp(-1, 1), atol=1e-4, rtol=0
    )


def test_mean_and_deviation_per_channel_of_a_plain_autoencoder() -> None:
    vae = vaes.kl(latents_mean=vaes.MEAN, latents_std=vaes.STD)
    images = torch.rand(1, 3, 8, 8)
    mean, std = (torch.tensor(each).view(1, -1, 1, 1) for each in (vaes.MEAN, vaes.STD))
    torch.testing.assert_close(LatentSpace(vae).encode(images), (raw(vae, images) - mean) / std)


@pytest.mark.parametrize("order", ["cpq", "pqc"])
def test_a_batch_norm_with_an_eps_and_an_order_of_its_own(order: Any) -> None:
    vae = vaes.flux2()
    space = LatentSpace(vae, BatchNorm(eps=0.5, order=order))
    images = torch.rand(1, 3, 8, 12)
    code = raw(vae, images)[0]
    mean, std = vae.bn.running_mean, (vae.bn.running_var + 0.5).sqrt()
    latents = space.encode(images)[0]
    for row in range(2):
        for column in range(3):
            cell, found = (each[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] for each in (code, latents))
            if order == "pqc":
                cell, found = cell.permute(1, 2, 0), found.permute(1, 2, 0)
            torch.testing.assert_close(found.flatten(), (cell.flatten() - mean) / std)
    assert space.fingerprint() != LatentSpace(vae).fingerprint()


def test_a_latent_space_is_the_same_wherever_its_model_lies(tmp_path: Path) -> None:
    vaes.kl().save_pretrained(tmp_path / "here")
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    here, there = (LatentSpace(AutoencoderKL.from_pretrained(tmp_path / name)) for name in ("here", "there"))
    assert here.fingerprint() == there.fingerprint()
    assert here.fingerprint() != LatentSpace(vaes.kl(scaling_factor=1.4)).fingerprint()


def test_configs_older_than_their_entries_are_completed_from_the_class() -> None:
    config = {"_class_name": "AutoencoderKLWan", "z_dim": 16}
    assert vae_geometry(config) == (8, 16)
    with pytest.raises(KeyError, match="spatial_compression_ratio"):
        vae_geometry({"_class_name": "AutoencoderKLHunyuanImage", "latent_channels": 4})


@pytest.mark.parametrize("wrong", [None, 0, "8", 8.5])
def test_a_factor_that_is_no_number_is_refused(wrong: Any) -> None:
    with pytest.raises(liftkit.UsageError, match="downsampling factor; expected 1 or more"):
        vae_geometry({"_class_name": "AutoencoderKLWan", "z_dim": 16, "scale_factor_spatial": wrong})


def test_sana_latents_of_a_real_encoder_through_its_class() -> None:
    """TAESANA's encoder in the place of a DC-AE's: what the class hands out is what the fit sees, times the scale."""
    encoder = sana_encoder()
    vae = vaes.dc(32, latent_channels=32)
    vae._encode = lambda images: encoder.encode(images)
    images = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = LatentSpace(vae).encode(images)
    assert latents.shape == (1, 32, 2, 3)
    torch.testing.assert_close(latents, encoder.encode(images) * 0.41)


def test_a_config_that_promises_other_latents_than_the_weights_make_is_refused() -> None:
    vae = AutoencoderKLWan(
        **{**vaes.PER_CHANNEL, "base_dim": 8, "dim_mult": [1, 1], "temperal_downsample": [False]}
    ).eval()
    with pytest.raises(liftkit.UsageError, match=r"encodes 32 x 32 pixels to latents \(4, 16, 16\).* \(4, 4, 4\)"):
        LatentSpace(vae).encode(torch.zeros(1, 3, 32, 32))


def test_the_pixel_autoencoder_answers_what_pipelines_of_every_family_read(tmp_path: Path) -> None:
    vae = PixelAutoencoder(fold=8, latent_patch=2)
    vae.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert not {"z_dim", "latents_mean", "scale_factor_spatial"} & stored.keys(), "what follows from fold is not stored"
    for each in (vae, PixelAutoencoder.from_pretrained(tmp_path)):
        config = each.config
        assert 2 ** (len(config.block_out_channels) - 1) == 2 ** (len(config.encoder_block_out_channels) - 1) == 8
        assert 2 ** len(each.temperal_downsample) == 8
        assert config.spatial_compression_ratio == each.spatial_compression_ratio == config.scale_factor_spatial == 8
        assert config.z_dim == config.latent_channels == len(config.latents_mean) == len(config.latents_std) == 192
        assert set(config.latents_mean) == {0.0}
        assert set(config.latents_std) == {1.0}
        assert 1 % config.scale_factor_temporal == 1, "pipelines of videos find one frame whole"


def test_the_pixel_autoencoder_takes_videos_and_opacity() -> None:
    vae = PixelAutoencoder(fold=4)
    frames = torch.rand(2, 3, 5, 8, 12) * 2 - 1
    code = vae.encode(frames)
    assert code.latent.shape == (2, 48, 5, 2, 3)
    assert torch.equal(code.latent_dist.mode(), code.latent)
    assert torch.equal(code.latent[:, :, 3], vae.encode(frames[:, :, 3]).latent)
    torch.testing.assert_close(vae.decode(code.latent).sample, frames, atol=2e-5, rtol=0)
    image = torch.rand(1, 3, 8, 8) * 2 - 1
    opacity = torch.full_like(image[:, :1], 0.5)  # of -1 to 1: three quarters
    on_white = vae.decode(vae.encode(torch.cat([image, opacity], dim=1)).latent).sample
    torch.testing.assert_close(on_white, 0.75 * image + 0.25, atol=2e-5, rtol=0)


def test_wan_of_two_experts_and_distilled_maps_are_refused_before_anything_is_fitted(cli: Any, tmp_path: Path) -> None:
    pipeline = ZOO["WanTransformer3DModel"].build()
    pipeline.register_modules(transformer_2=ZOO["WanTransformer3DModel"].transformer())
    pipeline.save_pretrained(tmp_path / "wan")
    code, _, err = cli("convert", tmp_path / "wan", "--images", "demo", "-o", tmp_path / "pixel")
    assert code == 2
    assert "transformer_2 is a second WanTransformer3DModel" in " ".join(err.split())
    ZOO["HunyuanImageTransformer2DModel"].build().save_pretrained(tmp_path / "hunyuan")
    config = tmp_path / "hunyuan" / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "use_meanflow": True}))
    code, _, err = cli("convert", tmp_path / "hunyuan", "--images", "demo", "-o", tmp_path / "pixel")
    assert code == 2
    assert "distilled (use_meanflow): it predicts the mean velocity" in " ".join(err.split())
    assert not (tmp_path / "pixel").exists()
