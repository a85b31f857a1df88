"""The latent space that a flow model was trained in: a VAE and the normalization its pipeline applies."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from liftkit.errors import UsageError

SUPPORTED_VAES = ("AutoencoderKL", "AutoencoderKLFlux2", "AutoencoderTiny")


def vae_geometry(config: dict[str, Any]) -> tuple[int, int]:
    """Downsampling factor f and latent channels C of a VAE, from its config.

    Raises:
        UsageError: if its class is not supported.
    """
    name = config.get("_class_name")
    if name not in SUPPORTED_VAES:
        raise UsageError(f"VAE class {name!r} is not supported; supported: {', '.join(SUPPORTED_VAES)}")
    # AutoencoderTiny (TAESD and its kin) has two such lists; what diffusers adds as block_out_channels is the decoder's.
    blocks = config["encoder_block_out_channels" if name == "AutoencoderTiny" else "block_out_channels"]
    return 2 ** (len(blocks) - 1), config["latent_channels"]


class LatentSpace:
    """Images to the *normalized* latents that the transformer sees, and back.

    Args:
        vae: a diffusers VAE with its weights.
    """

    def __init__(self, vae: Any) -> None:
        self.vae = vae
        config = {**vae.config, "_class_name": type(vae).__name__}
        self.factor, self.channels = vae_geometry(config)

    def fingerprint(self) -> str:
        """Tells this latent space from others: a digest of the VAE's config and weights."""
        digest = hashlib.sha256(repr(sorted(self.vae.config.items(), key=str)).encode())
        for name, tensor in sorted(self.vae.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.double().sum().item():.17g}".encode())
        return digest.hexdigest()

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """sRGB (B, 3, H, W) in [-1, 1] to normalized latents (B, C, H / f, W / f): the mode of the posterior."""
        encoded = self.vae.encode(images.to(self.vae.dtype))
        # A tiny autoencoder has no posterior. Its class maps [-1, 1] to the [0, 1] of its network and back by itself.
        latents = (encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()).float()
        mean, std = self._statistics(latents)
        return (latents - mean) / std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Normalized latents (B, C, h, w) to sRGB (B, 3, h f, w f) in [-1, 1], clamped.

        Raises:
            UsageError: if the decoder makes something that is not finite.
        """
        images = self.decode_raw(latents).float()
        if not torch.isfinite(images.sum()):
            raise UsageError(
                "the VAE's decoder makes NaN or infinity of its latents; are its weights whole? On a GPU, try --device cpu"
            )
        return images.clamp(-1.0, 1.0)

    def decode_raw(self, latents: Tensor) -> Tensor:
        """The same without clamping, and differentiable."""
        mean, std = self._statistics(latents)
        return self.vae.decode((latents * std + mean).to(self.vae.dtype)).sample

    def _statistics(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation that broadcast against latents (B, C, h, w)."""
        config = self.vae.config
        if type(self.vae).__name__ != "AutoencoderKLFlux2":
            shift = config.shift_factor if config.get("shift_factor") is not None else 0.0
            return latents.new_tensor(shift), latents.new_tensor(1.0 / config.scaling_factor)
        # FLUX.2: batch-norm statistics of 2 x 2 patches; tile them back over the latent grid.
        statistics = self.vae.bn
        mean = statistics.running_mean.float()
        std = (statistics.running_var.float() + config.batch_norm_eps).sqrt()
        rows, columns = (size // 2 for size in latents.shape[-2:])
        tiled = [F.pixel_shuffle(v.view(1, -1, 1, 1), 2).repeat(1, 1, rows, columns) for v in (mean, std)]
        return tiled[0].to(latents.device), tiled[1].to(latents.device)
