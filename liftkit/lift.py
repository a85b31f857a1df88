"""A Lift is two things, A and s: how the tokens of a latent space sit inside pixel tokens, ``x_0 ~ s A z_0``.

A free lift (s = 1) is a subspace alone, for a model from nothing whose noise has a low rank. It may lie in pixels or in latents.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from liftkit.color import ColorSpace, Oklab, color_from_dict
from liftkit.errors import UsageError
from liftkit.tokens import patchify, unpatchify

FORMAT = "liftkit.lift"
FORMAT_VERSION = 1
PICTURE = "picture."
MAX_DESCRIPTION = 8 * 1024 * 1024
"""Characters of the JSON beside the tensors; a lift of 1024 x 1024 pixel patches says less."""
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LARGEST_PATCH, LARGEST_PICTURE = 1024, 4096
SCALES = (1e-6, 1e6)
Space = Literal["pixel", "latent"]


def orthonormal_to(basis: Tensor) -> float:
    """What max |A^T A - I| of a basis may be: 1e-4, or 1e-2 where every number is one of half precision, whatever holds it."""
    halves = (torch.bfloat16, torch.float16)
    return 1e-2 if any(torch.equal(basis, basis.to(half).to(basis.dtype)) for half in halves) else 1e-4


def orthonormality(basis: Tensor) -> float:
    """max |A^T A - I| of a basis (D, r), computed in float64; 0 where it has no column."""
    if not basis.shape[1]:
        return 0.0
    wide = basis.double()
    identity = torch.eye(wide.shape[1], dtype=torch.float64, device=wide.device)
    return (wide.T @ wide - identity).abs().max().item()


# Tensors have no single truth value: lifts are compared by what they do, not by ==.
@dataclass(frozen=True, eq=False)
class Lift:
    """An orthonormal basis and a scale, with the geometry that gives them meaning.

    Args:
        basis: A, (D, r), orthonormal columns, D = 3 P**2. Rows in (channel, row, column) order of the P x P
            patch, columns in (channel, row, column) order of the latent patch.
        scale: s > 0, ``x_0 ~ s A z_0``.
        patch_size: P, side of the patch of one token, in pixels (or in latents, where that is the space).
        latent_patch: side of the latent patch of one token; the VAE's factor is ``patch_size / latent_patch``.
        color: the space in which pixels are meant.
        figures: what the fit found about itself (plain data).
        pictures: rows of a few images that show it, by name, (n, 3, H, W) uint8; may be empty.
        space: where the tokens lie: ``pixel``, or ``latent`` for a free subspace of a VAE's normalized latents, D = C P**2, which
            has no color.

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
    space: Space = "pixel"

    def __post_init__(self) -> None:
        if self.basis.dtype not in FLOATS:
            raise ValueError(f"lift: the basis is of {self.basis.dtype}, expected floating-point numbers")
        if self.space not in get_args(Space):
            raise ValueError(f"lift: the space is {str(self.space)[:60]}, expected {' or '.join(get_args(Space))}")
        if not 1 <= self.patch_size <= LARGEST_PATCH:
            raise ValueError(f"lift: pixel patches of {self.patch_size}, expected 1 to {LARGEST_PATCH}")
        if self.basis.ndim != 2 or self.basis.shape[0] != self.channels * self.patch_size**2 or not self.channels:
            numbers = f"{3 * self.patch_size**2}" if self.space == "pixel" else f"a multiple of {self.patch_size**2}"
            raise ValueError(
                f"lift: the basis has shape {tuple(self.basis.shape)}; a {self.patch_size} x {self.patch_size} "
                f"{'RGB' if self.space == 'pixel' else 'latent'} patch needs ({numbers}, rank)"
            )
        if self.space == "latent" and (self.latent_patch, self.scale) != (1, 1.0):
            raise ValueError(
                "lift: a subspace of latents is free (latent patch 1, scale 1), and this is of latent patches of "
                f"{self.latent_patch} and scale {self.scale:g}"
            )
        if self.latent_patch < 1 or not 0 <= self.rank <= self.dim or self.patch_size % self.latent_patch:
            raise ValueError(
                f"lift: rank {self.rank} of {self.dim}, pixel patch {self.patch_size}, latent patch "
                f"{self.latent_patch}: the rank is from 0 to {self.dim}, and the patches must divide"
            )
        if self.rank == 0 and (self.latent_patch, self.scale) != (1, 1.0):
            raise ValueError(
                "lift: the basis has no column, as only models from nothing have it (latent patch 1, scale 1), and this "
                f"is of latent patches of {self.latent_patch} and scale {self.scale:g}"
            )
        if self.rank % self.latent_patch**2:
            raise ValueError(
                f"lift: rank {self.rank} is not made of {self.latent_patch} x {self.latent_patch} latent patches"
            )
        if not SCALES[0] <= self.scale <= SCALES[1]:
            raise ValueError(
                f"lift: the scale must be a positive number, {SCALES[0]:g} to {SCALES[1]:g}, got {self.scale}"
            )
        _check_pictures(self.pictures)
        error, allowed = self.orthonormality(), orthonormal_to(self.basis)
        if not error < allowed:
            raise ValueError(
                f"lift: the basis is not orthonormal: max |A^T A - I| = {error:.2e}, allowed {allowed:.0e}"
            )

    @property
    def rank(self) -> int:
        """r, the number of columns."""
        return self.basis.shape[1]

    @property
    def dim(self) -> int:
        """D = 3 P**2, the numbers in a pixel token (C P**2 in latents)."""
        return self.basis.shape[0]

    @property
    def channels(self) -> int:
        """Channels of the states that it is for: 3 colors, or C of latents."""
        return 3 if self.space == "pixel" else self.basis.shape[0] // self.patch_size**2

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
        return orthonormality(self.basis)

    def to(self, device: torch.device) -> Lift:
        """The same with its basis in float32 on a device."""
        basis = self.basis.float().to(device)
        return self if basis is self.basis else replace(self, basis=basis)

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
        if self.space != "pixel":
            description["space"] = self.space
        pictures = {f"{PICTURE}{name}": images for name, images in self.pictures.items()}
        text = json.dumps(description, allow_nan=False)
        write_safetensors(Path(path), {"basis": self.basis, **pictures}, {"lift": text})

    @classmethod
    def load(cls, path: str | Path) -> Lift:
        """Read what :meth:`save` wrote.

        Raises:
            UsageError: if the file is missing, truncated or no lift, or anything in it is of a wrong type or out of range.
        """
        from liftkit.checkpoint.files import read_safetensors
        from liftkit.figures import Description, check, check_figures, parse_json

        tensors, metadata = read_safetensors(Path(path))
        try:
            if "lift" not in metadata or "basis" not in tensors:
                raise ValueError("no basis, or no description of it, is in the file")
            if len(metadata["lift"]) > MAX_DESCRIPTION:
                raise ValueError(f"{len(metadata['lift'])} characters of description, {MAX_DESCRIPTION} at most")
            unknown = sorted(name for name in tensors if name != "basis" and not name.startswith(PICTURE))
            if unknown:
                raise ValueError(f"unknown tensor {unknown[0]!r}")
            description = parse_json(metadata["lift"])
            check(Description, description, "lift")
            return cls(
                basis=tensors["basis"],
                scale=float(description["scale"]),
                patch_size=description["patch_size"],
                latent_patch=description["latent_patch"],
                color=color_from_dict(description["color"]),
                figures=check_figures(description["figures"]),
                pictures={k.removeprefix(PICTURE): v for k, v in tensors.items() if k.startswith(PICTURE)},
                space=description.get("space", "pixel"),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(
                f"{path}: not a lift that this version reads ({error}); make one with liftkit convert"
            ) from error


def _check_pictures(pictures: dict[str, Tensor]) -> None:
    for name, images in pictures.items():
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"lift: picture {name!r} is {images.dtype} {tuple(images.shape)}, expected uint8 (n, 3, H, W)"
            )
        if not images.numel() or max(images.shape) > LARGEST_PICTURE:
            raise ValueError(f"lift: picture {name!r} has sides {tuple(images.shape)}, expected 1 to {LARGEST_PICTURE}")


def principal_angles(a: Tensor, b: Tensor) -> list[float]:
    """Principal angles between two subspaces, rising, in degrees, [0, 90]; bases (D, r) orthonormal."""
    cosines = torch.linalg.svdvals(a.double().T @ b.double()).clamp(max=1.0)
    return torch.rad2deg(torch.arccos(cosines)).tolist()
