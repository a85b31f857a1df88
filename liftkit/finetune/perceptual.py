"""Spatial distances of images, for the perceptual term: LPIPS, features of the checkpoint's own VAE, image gradients."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liftkit.errors import UsageError
from liftkit.finetune.objective import Perceptual


def gradient_distance(images: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference of forward differences along rows and columns: (B, 1, H, W) >= 0."""
    difference = images - target
    rows = F.pad(difference.diff(dim=-2), (0, 0, 0, 1))
    columns = F.pad(difference.diff(dim=-1), (0, 1, 0, 0))
    return (rows.abs() + columns.abs()).mean(dim=1, keepdim=True)


class VaeFeatures:
    """Squared distance of unit-length features of the frozen VAE encoder's stages, as LPIPS does with VGG's.

    Args:
        vae: a diffusers VAE whose encoder has down blocks, or the one list of layers of a tiny autoencoder; nothing has to be
            downloaded.
    """

    def __init__(self, vae: Any) -> None:
        if not hasattr(vae.encoder, "down_blocks") and not isinstance(
            getattr(vae.encoder, "layers", None), nn.Sequential
        ):
            raise UsageError(
                f"objective.perceptual: vae: the encoder of {type(vae).__name__} has neither down blocks nor a list of layers; "
                "choose lpips, gradient or none"
            )
        self.encoder = vae.encoder.requires_grad_(False).eval()

    def __call__(self, images: Tensor, target: Tensor) -> Tensor:
        """See :data:`liftkit.finetune.objective.Perceptual`."""
        size = images.shape[-2:]
        with torch.no_grad():
            wanted = self._features(target)
        total = images.new_zeros(len(images), 1, *size)
        for found, goal in zip(self._features(images), wanted):
            distance = (found - goal).square().sum(dim=1, keepdim=True)
            total = total + F.interpolate(distance, size=size, mode="bilinear", align_corners=False)
        return total / len(wanted)

    def _features(self, images: Tensor) -> list[Tensor]:
        found = self._of_stages(images) if hasattr(self.encoder, "down_blocks") else self._of_layers(images)
        return [F.normalize(each.float(), dim=1, eps=1e-6) for each in found]

    def _of_layers(self, images: Tensor) -> list[Tensor]:
        """Of a tiny autoencoder: what goes into each convolution that ends a stage."""
        layers = list(self.encoder.layers)
        x = (images.to(layers[0].weight.dtype) + 1.0) / 2.0
        features = []
        for place, layer in enumerate(layers):
            if place and isinstance(layer, nn.Conv2d):
                features.append(x)
            x = layer(x)
        return features

    def _of_stages(self, images: Tensor) -> list[Tensor]:
        encoder = self.encoder
        x = encoder.conv_in(images.to(encoder.conv_in.weight.dtype))
        features = [x]
        for block in encoder.down_blocks:
            for layer in block.resnets:
                x = layer(x, temb=None)
            features.append(x)
            for layer in block.downsamplers or ():
                x = layer(x)
        return features


def lpips_distance(device: str) -> Perceptual:
    """LPIPS on VGG, spatial, in bfloat16 as published."""
    try:
        import lpips
    except ImportError as error:
        raise UsageError(
            "objective.perceptual: lpips: the lpips package is not installed; pip install 'liftkit[lpips]', "
            "or set objective.perceptual to vae, which needs nothing"
        ) from error
    try:
        network = lpips.LPIPS(net="vgg", spatial=True, verbose=False).requires_grad_(False).eval().to(device)
    except Exception as error:  # torchvision reports a missing download in many ways
        raise UsageError(
            f"objective.perceptual: lpips: the weights of VGG-16 cannot be had ({' '.join(str(error).split())}); fetch them "
            "once with network (torchvision.models.vgg16(weights='DEFAULT')), or set objective.perceptual to vae"
        ) from error

    def distance(images: Tensor, target: Tensor) -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16):
            return network(images, target).float()

    return distance
