"""Low-level statistics of images, to be read as ratios to those of real ones: spectrum, sharpness, grain, patch borders.

All are of second order: a filter or noise can game each of them, which is why a comparison scores both as controls.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from liftkit.evaluate.batches import batches
from liftkit.fit.gallery import border_energies, patch_grid_ratio

BINS = 2**16
GRAIN, EDGES = 0.50, 0.97


class Detail(NamedTuple):
    """What is measured of a set of images.

    Args:
        spectrum: (R,) power at radius 1 to R = min(H, W) / 2 cycles per image.
        laplacian: variance of the Laplacian, >= 0.
        grain: median length of the gradient, >= 0: noise in flat areas.
        edges: its 97 % quantile, >= 0: sharpness of edges.
        patch_grid: energy of differences across patch borders over that inside patches, >= 0; about 1 in real images.
    """

    spectrum: Tensor
    laplacian: float
    grain: float
    edges: float
    patch_grid: float


def detail(images: Tensor, patch: int) -> Detail:
    """All of them, for (n, 3, H, W) images in [-1, 1] or uint8 whose tokens are ``patch`` pixels wide."""
    grain, edges = gradient_quantiles(images, (GRAIN, EDGES))
    return Detail(radial_spectrum(images), laplacian_variance(images), grain, edges, patch_grid(images, patch))


def radial_spectrum(images: Tensor) -> Tensor:
    """Power spectral density, averaged over images, color channels and rings of equal radius.

    A Hann window keeps the jump between opposite borders out of the high frequencies.

    Args:
        images: (n, 3, H, W) in [-1, 1], or uint8.

    Returns:
        (R,) float64 for radius 1 to R = min(H, W) / 2 in cycles per shorter side.
    """
    height, width = images.shape[-2:]
    window = torch.outer(torch.hann_window(height), torch.hann_window(width))
    power = torch.zeros(height, width // 2 + 1, dtype=torch.float64)
    for part in batches(images):
        centered = part - part.mean(dim=(2, 3), keepdim=True)
        power += torch.fft.rfft2(centered * window).abs().square().mean(dim=1).sum(dim=0)
    side = min(height, width)
    rows, columns = torch.fft.fftfreq(height) * side, torch.fft.rfftfreq(width) * side
    radius = torch.hypot(rows[:, None], columns[None, :]).round().long()
    inside = (radius >= 1) & (radius <= side // 2)
    sums = torch.zeros(side // 2 + 1, dtype=torch.float64).index_add(0, radius[inside], power[inside])
    counts = torch.bincount(radius[inside], minlength=side // 2 + 1)
    return sums[1:] / counts[1:] / (len(images) * window.square().sum())


def spectrum_difference(spectrum: Tensor, reference: Tensor) -> Tensor:
    """``10 log10`` of the ratio of two radial spectra, (R,) in dB; 0 is best, negative is too smooth."""
    return 10.0 * torch.log10(spectrum.clamp(min=1e-12) / reference.clamp(min=1e-12))


def laplacian_variance(images: Tensor) -> float:
    """Variance of the four-neighbor Laplacian over pixels and color channels, the usual measure of sharpness."""
    total, count = torch.zeros(2, dtype=torch.float64), 0
    for part in batches(images):
        around = part[..., :-2, 1:-1] + part[..., 2:, 1:-1] + part[..., 1:-1, :-2] + part[..., 1:-1, 2:]
        values = (around - 4.0 * part[..., 1:-1, 1:-1]).double()
        total += torch.stack([values.sum(), values.square().sum()])
        count += values.numel()
    mean, square = (total / count).tolist()
    return square - mean**2


def gradient_quantiles(images: Tensor, levels: tuple[float, ...]) -> list[float]:
    """Quantiles over all pixels of the length of the gray image's gradient, by forward differences.

    Args:
        images: (n, 3, H, W) in [-1, 1], or uint8.
        levels: in (0, 1).

    Returns:
        One value in [0, 2.83] per level, exact to 4e-5.
    """
    high = 2.0 * 2.0**0.5
    histogram = torch.zeros(BINS, dtype=torch.float64)
    for part in batches(images):
        gray = part.mean(dim=1)
        down, right = gray.diff(dim=1)[:, :, :-1], gray.diff(dim=2)[:, :-1, :]
        histogram += torch.histc(torch.hypot(down, right), BINS, 0.0, high).double()
    shares = histogram.cumsum(0) / histogram.sum()
    places = torch.searchsorted(shares, torch.tensor(levels, dtype=torch.float64))
    return ((places.double() + 0.5) * (high / BINS)).tolist()


def patch_grid(images: Tensor, patch: int) -> float:
    """Energy of differences across the borders of ``patch`` x ``patch`` squares over that inside them; 1 is natural."""
    energies = torch.stack([border_energies(part, patch) for part in batches(images)]).sum(dim=0)
    return patch_grid_ratio(energies / len(images))
