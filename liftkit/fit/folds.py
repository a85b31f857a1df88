"""Moments in K folds, kept apart by image: every figure can be held out, and its spread costs nothing extra."""

from __future__ import annotations

import re
from collections.abc import Iterator
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from liftkit.color import SPACES
from liftkit.fit.moments import TokenMoments

FOLDS, MOST_FOLDS = 5, 1000


class FoldedMoments:
    """K token moments; image i of a source belongs to fold ``i % K``, whichever machine or batch brings it.

    Args:
        latent_dim: r.
        pixel_dim: D.
        folds: K >= 2.

    Attributes:
        folds: the moments of each fold.
    """

    def __init__(self, latent_dim: int, pixel_dim: int, folds: int = FOLDS) -> None:
        if folds < 2:
            raise ValueError(f"folds: need at least 2, got {folds}")
        self.folds = [TokenMoments(latent_dim, pixel_dim) for _ in range(folds)]

    def update(self, latent_tokens: Tensor, pixel_tokens: Tensor, indices: Tensor) -> None:
        """Add token pairs of images.

        Args:
            latent_tokens: (B, N, r).
            pixel_tokens: (B, N, D).
            indices: (B,) each image's place in its source.
        """
        for fold, which in self.groups(indices):
            # Mostly all images are of one fold, and need not be picked.
            some = slice(None) if len(which) == len(indices) else which
            self.folds[fold].update(latent_tokens[some], pixel_tokens[some])

    def groups(self, indices: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Each fold that has one of these images, and which of them are its own.

        Args:
            indices: (B,) each image's place in its source.

        Yields:
            The fold, and positions (b,) in ``indices``.
        """
        folds = indices % len(self.folds)
        for fold in folds.unique().tolist():
            yield fold, (folds == fold).nonzero()[:, 0]

    @property
    def total(self) -> TokenMoments:
        """All folds together."""
        return _sum(self.folds)

    def splits(self) -> Iterator[tuple[TokenMoments, TokenMoments]]:
        """For each fold that has images: the moments of all others, to fit on, and its own, to look at."""
        for index, fold in enumerate(self.folds):
            if fold.count:
                yield _sum([*self.folds[:index], *self.folds[index + 1 :]]), fold

    def halves(self) -> tuple[TokenMoments, TokenMoments]:
        """Two halves that share no image: even and odd folds."""
        return _sum(self.folds[::2]), _sum(self.folds[1::2])

    def halvings(self) -> Iterator[tuple[TokenMoments, TokenMoments]]:
        """Ways to part the images into two halves that share none, fold by fold: as many as folds that have images."""
        used = [fold for fold in self.folds if fold.count]
        for start in range(len(used) if len(used) > 2 else len(used) - 1):
            turned = [*used[start:], *used[:start]]
            yield _sum(turned[: len(used) // 2]), _sum(turned[len(used) // 2 :])

    def map(self, change: Any) -> FoldedMoments:
        """The same folds with each one's moments changed by a function."""
        first = self.folds[0]
        result = FoldedMoments(first.latent_dim, first.pixel_dim, len(self.folds))
        result.folds = [change(fold) for fold in self.folds]
        return result

    def __add__(self, other: FoldedMoments) -> FoldedMoments:
        """Fold by fold; both must have the same number of them."""
        if not isinstance(other, FoldedMoments):
            return NotImplemented
        if len(self.folds) != len(other.folds):
            raise ValueError(f"folds: cannot add {len(self.folds)} and {len(other.folds)} folds")
        result = self.map(lambda fold: fold)
        result.folds = [a + b for a, b in zip(self.folds, other.folds)]
        return result

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """All sums and counts by name, for a file or an all-reduce; :meth:`from_tensors` reads them."""
        stacked = {name: torch.stack([getattr(fold, name) for fold in self.folds]) for name in TokenMoments.SUMS}
        counts = torch.tensor([[fold.count, fold.images] for fold in self.folds], dtype=torch.float64)
        return {f"{prefix}{name}": value for name, value in {**stacked, "counts": counts}.items()}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], prefix: str = "") -> FoldedMoments:
        """Read what :meth:`tensors` gave.

        Raises:
            ValueError: if it did not; see :meth:`TokenMoments.checked`.
        """
        names = (*TokenMoments.SUMS, "counts")
        given = {name: tensors.get(f"{prefix}{name}", torch.empty(())) for name in names}
        counts, cross = given["counts"], given["cross"]
        if cross.ndim != 3 or counts.shape != (len(cross), 2) or counts.dtype != torch.float64:
            raise ValueError(f"{prefix}counts and {prefix}cross do not belong together")
        if len(counts) > MOST_FOLDS or any(len(value) != len(counts) for value in given.values() if value.ndim):
            raise ValueError(f"{len(counts)} folds, expected 2 to {MOST_FOLDS} of everything")
        if not (counts.isfinite().all() and (counts == counts.round()).all() and (counts >= 0).all()):
            raise ValueError(f"{prefix}counts are no whole numbers")
        result = cls(1, 1, len(counts))
        result.folds = [
            TokenMoments.checked(
                int(counts[fold, 0]),
                int(counts[fold, 1]),
                {name: given[name][fold] if given[name].ndim else given[name] for name in TokenMoments.SUMS},
            )
            for fold in range(len(counts))
        ]
        return result


def _sum(moments: list[TokenMoments]) -> TokenMoments:
    total = TokenMoments(moments[0].latent_dim, moments[0].pixel_dim)
    for each in moments:
        total = total + each
    return total


def read_folds(path: Path) -> tuple[dict[str, FoldedMoments], dict[str, str]]:
    """Folds by color space, and the file's metadata, as :func:`write_folds` wrote them.

    Raises:
        UsageError: if the file is missing, truncated or holds no moments.
    """
    from liftkit.checkpoint.files import read_safetensors
    from liftkit.errors import UsageError

    tensors, metadata = read_safetensors(path)
    if metadata.get("format") != "liftkit.folds":
        raise UsageError(f"{path}: no moments of liftkit; make them with liftkit fit --moments-out")
    names = sorted({name.split(".")[0] for name in tensors})
    try:
        if not names or not set(names) <= SPACES.keys():
            raise ValueError(f"expected the color spaces {', '.join(SPACES)}, found {', '.join(names)[:200] or 'none'}")
        _check_metadata(metadata)
        folds = {name: FoldedMoments.from_tensors(tensors, f"{name}.") for name in names}
        side = isqrt(folds[names[0]].folds[0].pixel_dim // 3)
        if 3 * side**2 != folds[names[0]].folds[0].pixel_dim:
            raise ValueError("its pixel tokens are no square patches of three channels")
        if len({(each.folds[0].latent_dim, each.folds[0].pixel_dim, len(each.folds)) for each in folds.values()}) > 1:
            raise ValueError("the moments of its color spaces are of different sizes")
    except ValueError as error:
        raise UsageError(f"{path}: no moments that this version reads ({error}); gather them again") from error
    return folds, metadata


def _check_metadata(metadata: dict[str, str]) -> None:
    for key in ("latent_patch", "done"):
        if key in metadata and not re.fullmatch(r"[0-9]{1,15}", metadata[key]):
            raise ValueError(f"{key} is {metadata[key][:40]!r}, expected a number")
    if int(metadata.get("latent_patch", "1")) < 1:
        raise ValueError("latent_patch is 0")
    # A share such as 3/8; the checkpoint of a pass has (2, 8).
    part = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", metadata.get("part", "1/1"))
    if not metadata.get("part", "").startswith("(") and (part is None or not 1 <= int(part[1]) <= int(part[2])):
        raise ValueError(f"part is {metadata['part'][:40]!r}, expected a share such as 3/8")


def write_folds(path: Path, folds: dict[str, FoldedMoments], metadata: dict[str, str]) -> None:
    """Write folds, one set per color space, atomically."""
    from liftkit.checkpoint.files import write_safetensors

    tensors = {key: value for name, each in folds.items() for key, value in each.tensors(f"{name}.").items()}
    write_safetensors(path, tensors, {**metadata, "format": "liftkit.folds"})
