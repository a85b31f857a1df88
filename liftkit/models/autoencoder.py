"""PixelAutoencoder: the place of the VAE in a pixel pipeline, taken by a lossless rearrangement.

``encode`` maps sRGB images into the color space and folds f x f pixels into channels (``pixel_unshuffle``), so
that the state has 3 f^2 channels on the VAE's own grid; ``decode`` is the inverse. Every stock pipeline then runs
as it is: patch sizes, grids and position ids do not change.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput
from diffusers.utils import BaseOutput
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


@dataclass
class PixelCode(BaseOutput):
    """What stock pipelines look for in what a VAE encoded: a distribution, or a latent (DC-AE)."""

    latent_dist: Exact
    latent: Tensor


def stock_answers(fold: int) -> dict[str, Any]:
    """What stock pipelines read of the config of a VAE, of whichever family theirs is.

    All of it follows from ``fold`` and says that nothing is to be rescaled, so it is not stored. Time is not
    compressed, but pipelines of videos find that one frame is whole only where a factor of time exceeds 1.
    """
    channels = 3 * fold * fold
    return {
        "encoder_block_out_channels": [channels] * fold.bit_length(),
        "z_dim": channels,
        "latents_mean": [0.0] * channels,
        "latents_std": [1.0] * channels,
        "spatial_compression_ratio": fold,
        "scale_factor_spatial": fold,
        "scale_factor_temporal": 4,
        "temperal_downsample": [False] * (fold.bit_length() - 1),
    }


class PixelAutoencoder(LoadsInFullPrecision, ModelMixin, AutoencoderMixin, ConfigMixin):
    """Images (B, 3, H, W) in [-1, 1] <-> states (B, 3 f^2, H / f, W / f) in the color space, without loss.

    Videos (B, 3, F, H, W) are encoded and decoded frame by frame. Images with a fourth plane, their opacity, are laid
    on white: pixels of three colors hold none.

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
            **stock_answers(fold),
        )
        self.spatial_compression_ratio, self.temporal_compression_ratio = fold, 1
        self.temperal_downsample = self.config.temperal_downsample
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

    def to_json_string(self) -> str:
        """The config as it is stored: without what follows from ``fold``."""
        whole = self._internal_dict  # type: ignore[has-type]
        answers = stock_answers(self.config.fold)
        self._internal_dict = type(whole)({key: value for key, value in whole.items() if key not in answers})
        try:
            stored: str = super().to_json_string()
        finally:
            self._internal_dict = whole
        return stored

    def encode(self, x: Tensor, return_dict: bool = True) -> PixelCode | tuple[Exact]:
        """Images (B, 3, H, W) in [-1, 1] to states (B, 3 f^2, H / f, W / f), float32; or videos, or with opacity."""
        code = Exact(_each_frame(lambda y: F.pixel_unshuffle(self.color.encode(_opaque(y)), self.config.fold), x))
        return PixelCode(latent_dist=code, latent=code.mean) if return_dict else (code,)

    def decode(
        self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """States (B, 3 f^2, h, w) to images (B, 3, h f, w f) in [-1, 1], float32, clamped to the gamut; or of videos."""
        images = _each_frame(lambda y: self.color.decode(F.pixel_shuffle(y, self.config.fold)), z)
        return DecoderOutput(sample=images) if return_dict else (images,)

    def forward(self, sample: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Encode and decode: the image again."""
        return self.decode(self.encode(sample, return_dict=False)[0].mode(), return_dict=return_dict)


def _each_frame(convert: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A conversion of images (B, C, H, W), for videos (B, C, F, H, W) too."""
    if x.ndim == 4:
        return convert(x)
    return convert(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(x), -1)).transpose(1, 2)


def _opaque(images: Tensor) -> Tensor:
    """Images (B, 3, H, W) of those with opacity (B, 4, H, W), on white."""
    if images.shape[1] != 4:
        return images
    return 1.0 + (images[:, :3] - 1.0) * (images[:, 3:] + 1.0) / 2.0


PixelAutoencoder.__module__ = HOME
