"""Features of images for Frechet distances that need no download: fixed random convolutions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from liftkit.evaluate.batches import batches

WIDTHS = (24, 32, 40)


@torch.no_grad()
def texture_features(images: Tensor) -> Tensor:
    """Mean responses of a random convolutional network: texture at three sizes, for any photographs.

    Three layers of 3 x 3 convolutions with normal weights of variance 2 / fan-in, always the same, each rectified and
    followed by a 2 x 2 average. The filters of the first layer have their mean removed, so that plain color leaves no
    response; every layer's responses are averaged over the image.

    Args:
        images: (n, 3, H, W) in [-1, 1], or uint8.

    Returns:
        (n, 96) float32, >= 0.
    """
    return torch.cat([_responses(part) for part in batches(images, 2**22)])


def _responses(images: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    means = []
    for layer, width in enumerate(WIDTHS):
        weight = torch.randn(width, images.shape[1], 3, 3, generator=generator)
        weight *= (2.0 / weight[0].numel()) ** 0.5
        if layer == 0:
            weight -= weight.mean(dim=(2, 3), keepdim=True)
        images = F.relu(F.conv2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), weight))
        means.append(images.mean(dim=(2, 3)))
        images = F.avg_pool2d(images, 2)
    return torch.cat(means, dim=1)
