"""A Lift is two things, A and s: how the tokens of a latent space sit inside pixel tokens, ``x_0 ~ s A z_0``."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from liftkit.color import ColorSpace, Oklab, color_from_dict
from liftkit.errors import UsageError
from liftkit.tokens import patchify, unpatchify

FORMAT = "liftkit.lift"
FORMAT_VERSION = 1
PICTURE = "picture."


# Tensors have no single truth value: lifts are compared by what they do, not by ==.
@dataclass(frozen=True, eq=False)
class Lift:
    """An orthonormal basis and a scale, with the geometry that gives them meaning.

    Args:
        basis: A, (D, r), orthonormal columns, D = 3 P**2. Rows in (channel, row, column) order of the P x P
            pixel patch, columns in (channel, row, column) order of the latent patch.
        scale: s > 0, ``x_0 ~ s A z_0``.
        patch_size: P, side of the pixel patch of one token.
        latent_patch: side of the latent patch of one token; the VAE's factor is ``patch_size / latent_patch``.
        color: the space in which pixels are meant.
        figures: what the fit found about itself (plain data).
        pictures: rows of a few images that show it, by name, (n, 3, H, W) uint8; may be empty.

    Raises:
        ValueError: if shapes, geometry or orthonormality do not hold.
    """

    basis: Tensor
    scale: float
    patch_size: int = 16
    latent_patch: int = 2
    color: ColorSpace = field(default_factory=Oklab)
    figures: dict[str, Any] = field(default_factory=dict)
    pictures: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.basis.ndim != 2 or self.basis.shape[0] != 3 * self.patch_size**2:
            raise ValueError(
                f"lift: the basis has shape {tuple(self.basis.shape)}; a {self.patch_size} x {self.patch_size} "
                f"RGB patch needs ({3 * self.patch_size**2}, rank)"
            )
        if self.latent_patch < 1 or self.rank > self.dim or self.patch_size % self.latent_patch:
            raise ValueError(
                f"lift: rank {self.rank} of {self.dim}, pixel patch {self.patch_size}, latent patch "
                f"{self.latent_patch}: the rank must not exceed {self.dim} and the patches must divide"
            )
        if not (self.scale > 0 and torch.isfinite(torch.tensor(self.scale))):
            raise ValueError(f"lift: the scale must be a positive number, got {self.scale}")
        error = self.orthonormality()
        if not error < 1e-4:
            raise ValueError(f"lift: the basis is not orthonormal: max |A^T A - I| = {error:.2e}, allowed 1e-4")

    @property
    def rank(self) -> int:
        """r, the number of columns."""
        return self.basis.shape[1]

    @property
    def dim(self) -> int:
        """D = 3 P**2, the numbers in a pixel token."""
        return self.basis.shape[0]

    @property
    def fold(self) -> int:
        """f = P / latent_patch: the pixels along one latent element, the VAE's own factor."""
        return self.patch_size // self.latent_patch

    @property
    def latent_channels(self) -> int:
        """C = r / latent_patch**2."""
        return self.rank // self.latent_patch**2

    def orthonormality(self) -> float:
        """max |A^T A - I|, computed in float64."""
        basis = self.basis.double()
        return (
            (basis.T @ basis - torch.eye(basis.shape[1], dtype=torch.float64, device=basis.device)).abs().max().item()
        )

    def raise_tokens(self, latent_tokens: Tensor) -> Tensor:
        """``s A z``: latent tokens (B, N, r) to pixel tokens (B, N, D)."""
        return self.scale * (latent_tokens @ self.basis.to(latent_tokens).T)

    def lower(self, state: Tensor) -> Tensor:
        """``A^T x``: a pixel state (B, 3, H, W) to the latent one (B, C, H / f, W / f) that is tied to it."""
        tokens = patchify(state, self.patch_size) @ self.basis.to(state)
        height, width = (size // self.fold for size in state.shape[-2:])
        return unpatchify(tokens, self.latent_patch, height, width)

    def save(self, path: str | Path) -> None:
        """Write ``.safetensors`` with the basis as it is and everything else as JSON metadata, atomically."""
        from liftkit.checkpoint.files import write_safetensors

        description = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "scale": self.scale,
            "patch_size": self.patch_size,
            "latent_patch": self.latent_patch,
            "color": self.color.to_dict(),
            "figures": self.figures,
        }
        pictures = {f"{PICTURE}{name}": images for name, images in self.pictures.items()}
        write_safetensors(Path(path), {"basis": self.basis, **pictures}, {"lift": json.dumps(description)})

    @classmethod
    def load(cls, path: str | Path) -> Lift:
        """Read what :meth:`save` wrote.

        Raises:
            UsageError: if the file is missing, truncated or no lift.
        """
        from liftkit.checkpoint.files import read_safetensors

        tensors, metadata = read_safetensors(Path(path))
        try:
            description = json.loads(metadata["lift"])
            if description["format"] != FORMAT or description["version"] != FORMAT_VERSION:
                raise ValueError(f"format {description['format']} version {description['version']}")
            return cls(
                basis=tensors["basis"],
                scale=float(description["scale"]),
                patch_size=int(description["patch_size"]),
                latent_patch=int(description["latent_patch"]),
                color=color_from_dict(description["color"]),
                figures=description["figures"],
                pictures={k.removeprefix(PICTURE): v for k, v in tensors.items() if k.startswith(PICTURE)},
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(
                f"{path}: not a lift that this version reads ({error}); make one with liftkit convert"
            ) from error
