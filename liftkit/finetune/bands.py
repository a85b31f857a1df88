"""The squared error of an image, weighted by band of its spectrum and by noise level.

Which errors a loss counts decides what a short finetune learns: by pixels the coarse ones, by whitened pixels the fine ones. What
an image means is in its coarse bands, and decided while the noise is high; its detail is painted where the noise is low. So the
weight of a band depends on sigma::

    e(sigma) = mean over f of  w(f, sigma) |DCT(error)(f)|^2
    w(f, sigma) = (1 + wavelength^2 |f|^2)^p / mean,    p = power max(0, 1 - sigma / below)

with f in cycles per pixel and an orthonormal DCT of the whole image, which has no borders of patches. From ``below`` on all
weights are 1 and e is the mean squared error. The energy of photographs falls as 1 / |f|^2: a power of 1 whitens them at
sigma = 0. The mean weight is 1 at every sigma, so that an error that is white counts as it does without.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class BandError:
    """e(sigma) of the equation above.

    Args:
        power: p at sigma = 0; below 0 it counts the coarse bands more.
        wavelength: in pixels; bands of longer waves count about alike.
        below: the noise level, in (0, 1], from which all bands count alike.
    """

    power: float
    wavelength: float
    below: float

    def __call__(self, error: Tensor, sigma: Tensor) -> Tensor:
        """The weighted mean square of each image.

        Args:
            error: (B, C, H, W).
            sigma: (B,) noise levels in [0, 1].

        Returns:
            (B,), in float32.
        """
        height, width = error.shape[-2:]
        with torch.autocast(error.device.type, enabled=False):
            rows, columns = (dct_matrix(side).to(error.device) for side in (height, width))
            energy = (rows @ error.float() @ columns.T).square().mean(dim=1)
            return (energy * self.weights(height, width, sigma.float())).mean(dim=(1, 2))

    def weights(self, height: int, width: int, sigma: Tensor) -> Tensor:
        """w, (B, H, W), for noise levels (B,); frequencies rise with row and column."""
        squares = [(torch.arange(side, device=sigma.device) / (2.0 * side)).square() for side in (height, width)]
        base = 1.0 + self.wavelength**2 * (squares[0][:, None] + squares[1][None, :])
        power = self.power * (1.0 - sigma / self.below).clamp(min=0.0)
        weights = base.pow(power[:, None, None])
        return weights / weights.mean(dim=(1, 2), keepdim=True)


@lru_cache(maxsize=16)
def dct_matrix(side: int) -> Tensor:
    """The orthonormal DCT-II of ``side`` numbers, (side, side) float32: row k is the wave of k / (2 side) cycles per pixel."""
    places = torch.arange(side, dtype=torch.float64)
    waves = torch.cos(math.pi / side * (places[None, :] + 0.5) * places[:, None]) * math.sqrt(2.0 / side)
    waves[0] /= math.sqrt(2.0)
    return waves.float()
