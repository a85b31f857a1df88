"""A few images seen through the VAE, the projection, the lift and the unconstrained map; and figures of pictures.

What moments cannot say, because sRGB is not linear in the color space, is measured on a few images of each fold, by a
lift that was fitted without that fold: PSNR, and whether patches show at their borders.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from liftkit.color import to_signed, to_uint8
from liftkit.fit.alignment import AffineMap, mean, spread
from liftkit.fit.pairs import PairSource
from liftkit.lift import Lift
from liftkit.tokens import patchify, unpatchify

SHOWN, PER_FOLD = 8, 10
SHOWN_SIDE = 256
ROWS = ("image", "vae", "projection", "lift", "linear")


@dataclass(frozen=True)
class HeldOut:
    """Images that a fit did not see.

    Args:
        lift: of all other folds.
        linear: the unconstrained map of all other folds, in the lift's color space.
        places: of the images in their source.
    """

    lift: Lift
    linear: AffineMap
    places: range


@dataclass
class Gallery:
    """Pictures and their figures.

    Args:
        pictures: by row name, (n, 3, H, W) uint8, at most 256 pixels a side.
        figures: the ``pictures`` of the schema in docs/report.md.
    """

    pictures: dict[str, Tensor]
    figures: dict[str, Any]


@torch.no_grad()
def make_gallery(source: PairSource, folds: Iterable[HeldOut]) -> Gallery | None:
    """Render every row for images of a source, each by a lift that was fitted without it.

    Args:
        source: of pairs.
        folds: where to look, and with which lift.

    Returns:
        The gallery, or None if none of these images can be used.
    """
    shown: dict[str, list[Tensor]] = {name: [] for name in ROWS}
    measured = []
    for fold in folds:
        found = _Measured()
        for _, latents, images in source.pairs(fold.places):
            rows = render(source, fold.lift, fold.linear, latents, images)
            found.add(rows, fold.lift.patch_size)
            for name, row in rows.items():
                shown[name].extend(row[: max(SHOWN - len(shown[name]), 0)].cpu())
        if found.count:
            measured.append(found)
    if not measured:
        return None
    figures: dict[str, Any] = {"count": sum(found.count for found in measured), "folds": len(measured), "spread": {}}
    tables = [found.figures() for found in measured]
    for figure, first in tables[0].items():
        columns = {name: [table[figure][name] for table in tables] for name in first}
        figures[figure] = {name: mean(values) for name, values in columns.items()}
        figures["spread"][figure] = {name: spread(values) for name, values in columns.items()}
    return Gallery({name: _small(row) for name, row in shown.items()}, figures)


class _Measured:
    """Figures of the pictures of one fold, image by image."""

    def __init__(self) -> None:
        self.count = 0
        self.psnrs: dict[str, dict[str, list[Tensor]]] = {
            "psnr": {name: [] for name in ROWS if name != "image"},
            "psnr_vae": {name: [] for name in ROWS if name not in ("image", "vae")},
        }
        self.borders = {name: torch.zeros(2, dtype=torch.float64) for name in ROWS}

    def add(self, rows: dict[str, Tensor], patch: int) -> None:
        """Look at a batch."""
        self.count += len(rows["image"])
        for figure, reference in (("psnr", "image"), ("psnr_vae", "vae")):
            for name, values in self.psnrs[figure].items():
                values.append(psnr(rows[name], rows[reference]).cpu())
        for name, row in rows.items():
            self.borders[name] += border_energies(row, patch)

    def figures(self) -> dict[str, dict[str, float]]:
        """PSNR in dB against the image and against the VAE, and the patch-grid ratio, of each row."""
        means = {
            figure: {name: torch.cat(values).mean().item() for name, values in table.items()}
            for figure, table in self.psnrs.items()
        }
        ratios = {name: patch_grid_ratio(energy / self.count) for name, energy in self.borders.items()}
        return {**means, "patch_grid": ratios}


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
    """Peak signal-to-noise ratio of each image, ``10 log10(4 / E(difference^2))`` in dB, [0, 126].

    Args:
        images, reference: (B, 3, H, W) in [-1, 1].
    """
    error = (images.float() - reference.float()).square().flatten(1).mean(dim=1)
    return 10.0 * torch.log10(4.0 / error.clamp(min=1e-12))


def border_energies(images: Tensor, patch: int) -> Tensor:
    """Mean squared differences of neighboring pixels across patch borders, and inside patches, (2,) float64.

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
    """Border over inside energy, > 0; a floor far below one gray level keeps plain images at 1."""
    border, inside = (energies + 1e-6).tolist()
    return border / inside


def _small(images: list[Tensor]) -> Tensor:
    """Those images (3, H, W) that have the first one's size, shrunk to SHOWN_SIDE, uint8 (n, 3, h, w)."""
    stacked = torch.stack([image for image in images if image.shape == images[0].shape]).float()
    side = max(stacked.shape[-2:])
    if side <= SHOWN_SIDE:
        return to_uint8(stacked)
    size = [round(length * SHOWN_SIDE / side) for length in stacked.shape[-2:]]
    return to_uint8(torch.nn.functional.interpolate(stacked, size=size, mode="area"))
