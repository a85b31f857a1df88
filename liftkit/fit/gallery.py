"""A few images seen through the VAE, the projection, the lift and the unconstrained map; and figures of pictures.

What moments cannot say, because sRGB is not linear in the colour space, is measured on a small sample of images that
the lift was not fitted on where there are any: PSNR, and whether patches show at their borders.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from liftkit.data.images import to_signed, to_uint8
from liftkit.fit.alignment import AffineMap
from liftkit.fit.pairs import PairSource
from liftkit.lift import Lift
from liftkit.tokens import patchify, unpatchify

SHOWN, MEASURED = 8, 48
SHOWN_SIDE = 256
ROWS = ("image", "vae", "projection", "lift", "linear")


@dataclass
class Gallery:
    """Pictures and their figures.

    Args:
        pictures: by row name, (n, 3, H, W) uint8, at most 256 pixels a side.
        figures: PSNR in dB of each row against the image, patch-grid ratio of each row.
    """

    pictures: dict[str, Tensor]
    figures: dict[str, Any]


@torch.no_grad()
def make_gallery(source: PairSource, lift: Lift, linear: AffineMap, places: range) -> Gallery | None:
    """Render every row for images of a source.

    Args:
        source: of pairs.
        lift: to look at.
        linear: the unconstrained map, in the lift's colour space.
        places: of the images; those that a fold was held out with are the honest choice.

    Returns:
        The gallery, or None if none of these images can be used.
    """
    shown: dict[str, list[Tensor]] = {name: [] for name in ROWS}
    count = 0
    psnrs: dict[str, list[Tensor]] = {name: [] for name in ROWS if name != "image"}
    borders = {name: torch.zeros(2, dtype=torch.float64) for name in ROWS}
    for _, latents, images in source.pairs(places):
        rows = render(source, lift, linear, latents, images)
        count += len(images)
        for name, row in rows.items():
            if len(shown[name]) < SHOWN:
                shown[name].extend(row[: SHOWN - len(shown[name])].cpu().split(1))
            borders[name] += border_energies(row, lift.patch_size)
            if name in psnrs:
                psnrs[name].append(psnr(row, rows["image"]).cpu())
    if not count:
        return None
    small = {name: _small(row) for name, row in shown.items()}
    figures = {
        "count": count,
        "psnr": {name: torch.cat(values).mean().item() for name, values in psnrs.items()},
        "patch_grid": {name: patch_grid_ratio(energy / count) for name, energy in borders.items()},
    }
    return Gallery(small, figures)


def render(source: PairSource, lift: Lift, linear: AffineMap, latents: Tensor, images: Tensor) -> dict[str, Tensor]:
    """Every row of the gallery for one batch, sRGB in [-1, 1]."""
    height, width = images.shape[-2:]
    z, x = patchify(latents, lift.latent_patch), patchify(lift.color.encode(images), lift.patch_size)
    basis = lift.basis.to(x)

    def show(tokens: Tensor) -> Tensor:
        return lift.color.decode(unpatchify(tokens, lift.patch_size, height, width))

    return {
        "image": to_signed(images),
        "vae": source.space.decode(latents),
        "projection": show(x @ basis @ basis.T),
        "lift": show(lift.raise_tokens(z)),
        "linear": show(linear(z)),
    }


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB; both (B, 3, H, W) in [-1, 1]."""
    error = (images.float() - reference.float()).square().flatten(1).mean(dim=1)
    return 10.0 * torch.log10(4.0 / error.clamp(min=1e-12))


def border_energies(images: Tensor, patch: int) -> Tensor:
    """Mean squared differences of neighbouring pixels across patch borders, and inside patches, (2,) float64.

    Their ratio, the patch-grid ratio, is 1 where patches do not show, as in any natural image.
    """
    result = torch.zeros(2, dtype=torch.float64)
    for axis in (-2, -1):
        squares = images.diff(dim=axis).cpu().double().square().transpose(axis, -1)
        across = torch.arange(squares.shape[-1]) % patch == patch - 1
        if across.any():
            result += torch.stack([squares[..., across].mean(), squares[..., ~across].mean()])
    return result * len(images)


def patch_grid_ratio(energies: Tensor) -> float:
    """Border over inside energy; a floor far below one grey level keeps plain images at 1."""
    border, inside = (energies + 1e-6).tolist()
    return border / inside


def _small(images: list[Tensor]) -> Tensor:
    """At most SHOWN images of the first one's size, shrunk to SHOWN_SIDE, uint8."""
    same = [image for image in images if image.shape == images[0].shape]
    stacked = torch.cat(same).float()
    side = max(stacked.shape[-2:])
    if side <= SHOWN_SIDE:
        return to_uint8(stacked)
    size = [round(length * SHOWN_SIDE / side) for length in stacked.shape[-2:]]
    return to_uint8(torch.nn.functional.interpolate(stacked, size=size, mode="area"))
