"""The VAEs of diffusers, by class: how far each downsamples, and how pipelines normalize what it encodes to.

An entry of :data:`FAMILIES` is all that liftkit knows of a class. Nothing here imports diffusers unless a stored
config lacks an entry that its class has a default for (configs are older than the entries that came later).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from liftkit.errors import UsageError
from liftkit.tokens import TokenOrder

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Scalar:
    """One shift and one scale for all channels; a mean and a deviation per channel where the config has both."""

    def __call__(self, vae: Any, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of latents (B, C, h, w), of shapes that broadcast against them."""
        config = vae.config
        if config.get("latents_mean") is not None and config.get("latents_std") is not None:
            return PerChannel()(vae, latents)
        shift, scale = config.get("shift_factor"), config.get("scaling_factor")
        return latents.new_tensor(shift or 0.0), latents.new_tensor(1.0 if scale is None else 1.0 / scale)


@dataclass(frozen=True)
class PerChannel:
    """A mean and a deviation per channel, from the config."""

    def __call__(self, vae: Any, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, (1, C, 1, 1) each."""
        mean, std = (latents.new_tensor(vae.config[key]).view(1, -1, 1, 1) for key in ("latents_mean", "latents_std"))
        return mean, std


@dataclass(frozen=True)
class BatchNorm:
    """Running statistics over the numbers of a packed token.

    Args:
        eps: what is added to the variance, where the pipeline has one of its own instead of the config's.
        order: how the pipeline flattens a patch of latents into the token that it normalizes.
    """

    eps: float | None = None
    order: TokenOrder = "cpq"

    def __call__(self, vae: Any, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, (1, C, h, w) each: the token's, tiled over the latents' grid."""
        eps = vae.config.batch_norm_eps if self.eps is None else self.eps
        patch = vae.config.get("patch_size", (2, 2))[0]
        rows, columns = (size // patch for size in latents.shape[-2:])

        def tile(token: Tensor) -> Tensor:
            cells = (
                token.view(-1, patch, patch) if self.order == "cpq" else token.view(patch, patch, -1).permute(2, 0, 1)
            )
            return cells.repeat(1, rows, columns).unsqueeze(0).to(latents.device)

        return tile(vae.bn.running_mean.float()), tile((vae.bn.running_var.float() + eps).sqrt())


Statistics = Callable[[Any, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Family:
    """What tells one class of VAEs from the others.

    Args:
        factor: pixels along one latent element, from the config.
        statistics: ``(vae, latents) -> mean, standard deviation`` that its pipelines normalize latents by.
        channels: config entry of the number of latent channels.
        video: it takes and gives videos (B, C, F, H, W); an image is a video of one frame.
    """

    factor: Callable[[Config], int]
    statistics: Statistics = Scalar()
    channels: str = "latent_channels"
    video: bool = False


def _halvings(key: str) -> Callable[[Config], int]:
    return lambda config: int(2 ** (len(config[key]) - 1))


FAMILIES: dict[str, Family] = {
    "AutoencoderKL": Family(_halvings("block_out_channels")),
    "AutoencoderKLFlux2": Family(_halvings("block_out_channels"), BatchNorm()),
    # It has two such lists; what diffusers adds as block_out_channels is the decoder's.
    "AutoencoderTiny": Family(_halvings("encoder_block_out_channels")),
    # Ours: TAEF2, whose latents are FLUX.2's normalized ones.
    "AutoencoderTinyFlux2": Family(_halvings("encoder_block_out_channels")),
    "AutoencoderDC": Family(_halvings("encoder_block_out_channels")),
    "AutoencoderKLHunyuanImage": Family(lambda config: config["spatial_compression_ratio"]),
    "AutoencoderKLQwenImage": Family(
        lambda config: int(2 ** len(config["temperal_downsample"])), PerChannel(), "z_dim", video=True
    ),
    "AutoencoderKLQwenImage21": Family(
        lambda config: config["scale_factor_spatial"], PerChannel(), "z_dim", video=True
    ),
    "AutoencoderKLWan": Family(lambda config: config["scale_factor_spatial"], PerChannel(), "z_dim", video=True),
}


class _Completed(dict[str, Any]):
    """A stored config that answers with the default of its class for an entry that it lacks."""

    def __missing__(self, key: str) -> Any:
        import diffusers

        known = inspect.signature(getattr(diffusers, self["_class_name"]).__init__).parameters
        default = known[key].default if key in known else inspect.Parameter.empty
        if default is inspect.Parameter.empty:
            raise KeyError(key)
        return default


def vae_family(name: str | None) -> Family:
    """The family of a VAE's class.

    Raises:
        UsageError: if it is not supported.
    """
    if name not in FAMILIES:
        raise UsageError(f"VAE class {name!r} is not supported; supported: {', '.join(FAMILIES)}")
    return FAMILIES[name]


def vae_geometry(config: Config) -> tuple[int, int]:
    """Downsampling factor f and latent channels C of a VAE, from its config with ``_class_name``.

    Raises:
        UsageError: if its class is not supported.
        KeyError: naming an entry that it lacks and that has no default.
    """
    family = vae_family(config.get("_class_name"))
    completed = _Completed(config)
    factor, channels = family.factor(completed), completed[family.channels]
    for number, what in ((factor, "downsampling factor"), (channels, family.channels)):
        if not isinstance(number, int) or number < 1:
            raise UsageError(
                f"{config['_class_name']}: its config.json has {number!r} as its {what}; expected 1 or more"
            )
    return factor, channels


def has_alpha(config: Config) -> bool:
    """Whether a VAE's images have a fourth plane, their opacity (Qwen-Image 2.1, Qwen-Image-Layered)."""
    planes, patch = config.get("input_channels", config.get("in_channels", 3)), config.get("patch_size")
    return planes == 4 * (patch**2 if isinstance(patch, int) else 1)


def with_alpha(images: Tensor) -> Tensor:
    """Images (B, 3, ...) in [-1, 1] with a plane of full opacity, (B, 4, ...)."""
    return F.pad(images, (0, 0) * (images.ndim - 2) + (0, 1), value=1.0)
