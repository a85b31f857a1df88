"""The latent space that a flow model was trained in: a VAE and the normalization its pipeline applies."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from liftkit.errors import UsageError
from liftkit.models.broken import first_not_finite
from liftkit.models.vaes import Statistics, has_alpha, vae_family, vae_geometry, with_alpha


class LatentSpace:
    """Images to the *normalized* latents that the transformer sees, and back.

    Args:
        vae: a diffusers VAE with its weights.
        statistics: mean and deviation of its latents where the model's pipeline has its own way; otherwise those of
            the VAE's family.
    """

    def __init__(self, vae: Any, statistics: Statistics | None = None) -> None:
        self.vae = vae
        config = {**vae.config, "_class_name": type(vae).__name__}
        self.family = vae_family(config["_class_name"])
        self.own_statistics, self.statistics = statistics, statistics or self.family.statistics
        self.factor, self.channels = vae_geometry(config)
        self.alpha = has_alpha(config)

    def fingerprint(self) -> str:
        """Tells this latent space from others: a digest of the VAE's class, config and weights, wherever the model lies and
        whichever version of diffusers reads it."""
        config = {key: value for key, value in self.vae.config.items() if not key.startswith("_")}
        digest = hashlib.sha256(repr([type(self.vae).__name__, *sorted(config.items())]).encode())
        for name, tensor in sorted(self.vae.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.double().sum().item():.17g}".encode())
        if self.own_statistics is not None:
            # A function's repr has its address in memory, which is another in each process.
            own = self.own_statistics
            digest.update(getattr(own, "__qualname__", repr(own)).encode())
        return digest.hexdigest()

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """sRGB (B, 3, H, W) in [-1, 1] to normalized latents (B, C, H / f, W / f): the mode of the posterior.

        Raises:
            UsageError: if the VAE's latents are not of the size that its config says, or are not finite because of its weights.
        """
        planes = (with_alpha(images) if self.alpha else images).to(self.vae.dtype)
        encoded = self.vae.encode(planes.unsqueeze(2) if self.family.video else planes)
        latents = _mode(encoded).float()
        latents = latents.squeeze(2) if self.family.video else latents
        height, width = images.shape[-2:]
        wanted = (self.channels, height // self.factor, width // self.factor)
        if latents.shape[1:] != wanted:
            raise UsageError(
                f"the VAE ({type(self.vae).__name__}) encodes {height} x {width} pixels to latents {tuple(latents.shape[1:])}, "
                f"where its config.json promises {wanted}; is the config.json that of these weights?"
            )
        mean, std = self.statistics(self.vae, latents)
        latents = (latents - mean) / std
        if not torch.isfinite(latents.sum()):
            tensor = first_not_finite(self.vae)
            if tensor is not None:
                raise UsageError(
                    f"vae: its latents are not finite, for its tensor {tensor!r} holds NaN or infinity; download the model again"
                )
        return latents

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
        """The same without clamping, and differentiable; the opacity of images that have one is left out."""
        mean, std = self.statistics(self.vae, latents)
        raw = (latents * std + mean).to(self.vae.dtype)
        decoded: Tensor = self.vae.decode(raw.unsqueeze(2) if self.family.video else raw).sample
        return (decoded.squeeze(2) if self.family.video else decoded)[:, :3]


def _mode(encoded: Any) -> Tensor:
    """The code that an encoder is surest of: a distribution's mode, or the code itself where there is no distribution
    (``latent`` of AutoencoderDC, ``latents`` of AutoencoderTiny, whose class maps [-1, 1] to the [0, 1] of its network)."""
    if hasattr(encoded, "latent_dist"):
        found: Tensor = encoded.latent_dist.mode()
        return found
    return encoded.latent if hasattr(encoded, "latent") else encoded.latents
