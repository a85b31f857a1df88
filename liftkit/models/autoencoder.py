"""PixelAutoencoder: the place of the VAE in a pixel pipeline, taken by a lossless rearrangement.

``encode`` maps sRGB images into the color space and folds f x f pixels into channels (``pixel_unshuffle``), so
that the state has 3 f^2 channels on the VAE's own grid; ``decode`` is the inverse. Every stock pipeline then runs
as it is: patch sizes, grids and position ids do not change.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor, nn

from liftkit.color import ColorSpace, Oklab, color_from_dict
from liftkit.lift import Lift
from liftkit.models.mixin import LoadsInFullPrecision
from liftkit.models.spec import HOME


class Exact:
    """The distribution of a lossless code: all its mass on one value."""

    def __init__(self, value: Tensor) -> None:
        self.mean = value

    def mode(self) -> Tensor:
        """The value."""
        return self.mean

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """The value."""
        return self.mean


class PixelAutoencoder(LoadsInFullPrecision, ModelMixin, AutoencoderMixin, ConfigMixin):
    """Images (B, 3, H, W) in [-1, 1] <-> states (B, 3 f^2, H / f, W / f) in the color space, without loss.

    Args:
        fold: f, a power of two: the downsampling factor of the VAE whose place this takes.
        latent_patch: side of a token's patch on the folded grid.
        color: the color space, as :meth:`liftkit.color.ColorSpace.to_dict` describes it.
        sample_size: the image size that the model was made for, in pixels.
        block_out_channels, latent_channels, scaling_factor, shift_factor, batch_norm_eps: what stock pipelines
            read off a VAE; they follow from ``fold`` and say that nothing is to be rescaled.
    """

    config_name = "config.json"
    _supports_gradient_checkpointing = False
    _keep_in_fp32_modules: ClassVar[list[str]] = ["bn"]

    @register_to_config
    def __init__(
        self,
        fold: int = 8,
        latent_patch: int = 2,
        color: dict[str, Any] | None = None,
        sample_size: int = 1024,
        block_out_channels: tuple[int, ...] | None = None,
        latent_channels: int | None = None,
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
        batch_norm_eps: float = 0.0,
    ) -> None:
        super().__init__()
        if fold < 1 or fold & (fold - 1):
            raise ValueError(f"PixelAutoencoder: fold must be a power of two, got {fold}")
        channels = 3 * fold * fold
        # Pipelines take the factor as 2 ** (len(block_out_channels) - 1).
        self.register_to_config(
            color=color if color is not None else Oklab().to_dict(),
            block_out_channels=[channels] * fold.bit_length(),
            latent_channels=channels,
        )
        # FLUX.2 pipelines normalize tokens by these statistics: mean 0 and variance 1 leave them alone.
        self.bn = nn.BatchNorm2d(channels * latent_patch**2, eps=batch_norm_eps, affine=False)
        self.bn.requires_grad_(False)
        self.use_slicing = self.use_tiling = False

    @classmethod
    def from_lift(cls, lift: Lift, sample_size: int = 1024) -> PixelAutoencoder:
        """The autoencoder of a lifted model."""
        return cls(fold=lift.fold, latent_patch=lift.latent_patch, color=lift.color.to_dict(), sample_size=sample_size)

    @property
    def color(self) -> ColorSpace:
        """The color space of the states."""
        return color_from_dict(self.config.color)

    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[Exact]:
        """Images (B, 3, H, W) in [-1, 1] to states (B, 3 f^2, H / f, W / f), float32."""
        code = Exact(F.pixel_unshuffle(self.color.encode(x), self.config.fold))
        return AutoencoderKLOutput(latent_dist=code) if return_dict else (code,)

    def decode(
        self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """States (B, 3 f^2, h, w) to images (B, 3, h f, w f) in [-1, 1], float32, clamped to the gamut."""
        images = self.color.decode(F.pixel_shuffle(z, self.config.fold))
        return DecoderOutput(sample=images) if return_dict else (images,)

    def forward(self, sample: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Encode and decode: the image again."""
        return self.decode(self.encode(sample, return_dict=False)[0].mode(), return_dict=return_dict)


PixelAutoencoder.__module__ = HOME
