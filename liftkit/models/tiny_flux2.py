"""AutoencoderTinyFlux2: TAEF2, the tiny autoencoder of FLUX.2's latent space, as a VAE of stock pipelines.

It is diffusers' ``AutoencoderTiny`` but for the three blocks at 1/8 of the image's size on either side, which add to their
input what a pooled view of it gives: ``x + pool(x)``, pool being two 1 x 1 convolutions around a group normalization
over the whole picture. TAEF2 and its network are by Ollin Boer Bohan (MIT license, beside the weights).
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

from diffusers import AutoencoderTiny
from diffusers.models.autoencoders.vae import AutoencoderTinyBlock
from torch import Tensor, nn

from liftkit.models.spec import HOME


class PooledBlock(AutoencoderTinyBlock):
    """A block of TAESD that sees the whole picture's statistics first.

    Args:
        width: its channels.
        groups: of the normalization, which has four times as many channels.
    """

    def __init__(self, width: int, groups: int = 4) -> None:
        super().__init__(width, width, "relu")
        wide = 4 * width
        self.pool = nn.Sequential(
            nn.Conv2d(width, wide, 1, bias=False),
            nn.GroupNorm(groups, wide),
            nn.ReLU(),
            nn.Conv2d(wide, width, 1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, width, h, w) to features of the same shape."""
        features: Tensor = super().forward(x + self.pool(x))
        return features


class AutoencoderTinyFlux2(AutoencoderTiny):
    """Images (B, 3, H, W) in [-1, 1] <-> FLUX.2's latents (B, 32, H / 8, W / 8), already normalized: the statistics of a
    token's batch norm, which FLUX.2's pipelines apply, are mean 0 and variance 1 here.

    It is made from the arguments of ``AutoencoderTiny``; the blocks of the deepest stage on either side are pooled.
    ``sample_size`` is the side in pixels of the images that a pipeline's model paints.
    """

    @functools.wraps(AutoencoderTiny.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, sample_size: int | None = None, **config: Any) -> None:
        super().__init__(*args, **config)
        # The encoder ends in these blocks and a convolution; the decoder begins with a convolution, an activation and these.
        last, first = self.config.num_encoder_blocks[-1], self.config.num_decoder_blocks[0]
        _pool(self.encoder.layers, range(len(self.encoder.layers) - 1 - last, len(self.encoder.layers) - 1))
        _pool(self.decoder.layers, range(2, 2 + first))
        self.register_to_config(sample_size=sample_size, batch_norm_eps=0.0)
        self.bn = nn.BatchNorm2d(4 * self.config.latent_channels, eps=0.0, affine=False)
        # No file of TAEF2 has them, and they are the same for all.
        self.bn._non_persistent_buffers_set.update(self.bn._buffers)

    # diffusers asks a signature what a config may hold.
    _bare = inspect.signature(AutoencoderTiny.__init__)
    _size = inspect.Parameter("sample_size", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=int | None)
    __init__.__signature__ = _bare.replace(parameters=[*_bare.parameters.values(), _size])  # type: ignore[attr-defined]


def _pool(layers: nn.Sequential, places: range) -> None:
    for place in places:
        convolution = layers[place].get_submodule("conv.0")
        assert isinstance(convolution, nn.Conv2d)
        layers[place] = PooledBlock(convolution.in_channels)


AutoencoderTinyFlux2.__module__ = HOME
