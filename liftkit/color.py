"""Color spaces: what the pixel model sees instead of sRGB.

Oklab after Ottosson (2020): sRGB -> linear RGB -> LMS -> cube root -> Oklab. Images go in and come out as
sRGB in [-1, 1]; inside, each space is shifted by a mean per channel and divided by one scalar, so that its
values have roughly zero mean and unit scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from liftkit.asymflow import at_least_float32

Matrix = tuple[tuple[float, ...], ...]
_LMS_FROM_RGB = (
    (0.4122214708, 0.5363325363, 0.0514459929),
    (0.2119034982, 0.6806995451, 0.1073969566),
    (0.0883024619, 0.2817188376, 0.6299787005),
)
_LAB_FROM_LMS = (
    (0.2104542553, 0.7936177850, -0.0040720468),
    (1.9779984951, -2.4285922050, 0.4505937099),
    (0.0259040371, 0.7827717662, -0.8086757660),
)


def _inverse(matrix: Matrix) -> Matrix:
    return tuple(map(tuple, torch.linalg.inv(torch.tensor(matrix, dtype=torch.float64)).tolist()))


_LMS_FROM_LAB, _RGB_FROM_LMS = _inverse(_LAB_FROM_LMS), _inverse(_LMS_FROM_RGB)
LEAST, LARGEST = 1e-7, 1e3
"""Bounds of a normalization: colors lie in [-1, 1] before it."""


SPACES: dict[str, type[ColorSpace]] = {}
"""Every color space by its name; a subclass enters itself."""


class ColorSpace:
    """A color space with its normalization: ``(values - mean) / std``.

    A subclass has a ``name``, ``_from_srgb`` and ``_to_srgb``, which map each pixel by itself; defining it is enough for fits
    and files to know it.

    Args:
        mean: three numbers, in the space's own units.
        std: one scalar > 0, in the space's own units.

    Raises:
        ValueError: if there are not three means, or a number is out of range.
    """

    name: str = ""
    signed: bool = False
    """Whether values before normalization are sRGB in [-1, 1] itself, so that uint8 may stand for them."""

    def __init_subclass__(cls) -> None:
        SPACES.setdefault(cls.name, cls)

    def __init__(self, mean: Sequence[float], std: float) -> None:
        self.mean = tuple(float(value) for value in mean)
        self.std = float(std)
        if (
            len(self.mean) != 3
            or not all(abs(value) <= LARGEST for value in (*self.mean, self.std))
            or self.std < LEAST
        ):
            raise ValueError(
                f"color: expected three means from -{LARGEST:g} to {LARGEST:g} and a std from {LEAST:g} to {LARGEST:g}, "
                f"got mean={self.mean}, std={self.std}"
            )

    def encode(self, images: Tensor) -> Tensor:
        """sRGB (B, 3, H, W), uint8 or in [-1, 1] -> the normalized space, float32 or float64 even under autocast."""
        values = self.plain(images)
        return (values - self._mean_like(values)) / self.std

    def decode(self, colors: Tensor) -> Tensor:
        """The normalized space (B, 3, H, W) -> sRGB in [-1, 1], clamped to the gamut, in the same precision."""
        with torch.autocast(colors.device.type, enabled=False):
            values = at_least_float32(colors)
            return self._to_srgb(values * self.std + self._mean_like(values))

    @classmethod
    def plain(cls, images: Tensor) -> Tensor:
        """The same before normalization, in the space's own units; statistics are taken of these."""
        with torch.autocast(images.device.type, enabled=False):
            return cls._from_srgb(images if images.dtype == torch.uint8 else at_least_float32(images))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for configs and metadata; :func:`color_from_dict` reads it."""
        return {"name": self.name, "mean": list(self.mean), "std": self.std}

    @classmethod
    def fitted(cls, images: Tensor) -> ColorSpace:
        """This space normalized to given images: mean per channel, one standard deviation for all.

        Args:
            images: sRGB (B, 3, H, W) in [-1, 1].
        """
        return cls.from_statistics(*color_statistics(cls, images))

    @classmethod
    def from_statistics(cls, count: int, total: Tensor, square: float) -> ColorSpace:
        """The fit from sums that add up over batches (see :func:`color_statistics`)."""
        mean = total / count
        variance = square / (3 * count) - mean.square().mean().item()
        return cls(mean.tolist(), max(variance, 1e-12) ** 0.5)

    def _mean_like(self, values: Tensor) -> Tensor:
        return constant(self.mean, values.dtype, values.device).view(3, 1, 1)

    @staticmethod
    def _from_srgb(images: Tensor) -> Tensor:
        """sRGB (B, 3, H, W), uint8 or in [-1, 1], to values before normalization."""
        raise NotImplementedError

    def _to_srgb(self, values: Tensor) -> Tensor:
        """Values before normalization to sRGB in [-1, 1], clamped to the gamut."""
        raise NotImplementedError

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ColorSpace) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash((self.name, self.mean, self.std))

    def __repr__(self) -> str:
        return f"{type(self).__name__}(mean={self.mean}, std={self.std})"


class Oklab(ColorSpace):
    """Oklab, the choice for conversion and finetuning; mean and std default to the paper's."""

    name = "oklab"

    def __init__(self, mean: Sequence[float] = (0.56, 0.0, 0.01), std: float = 0.16) -> None:
        super().__init__(mean, std)

    @staticmethod
    def _from_srgb(images: Tensor) -> Tensor:
        # Linear RGB is not negative, nor are the shares that make LMS of it.
        lms = _mix(_to_linear(images), _LMS_FROM_RGB)
        # Eight bits have no gradient, and nothing between 0 and 1e-5, so that they need no line near 0.
        return _mix(_power(lms, 1.0 / 3.0) if images.dtype == torch.uint8 else _cube_root(lms), _LAB_FROM_LMS)

    def _to_srgb(self, values: Tensor) -> Tensor:
        lms = _mix(values, _LMS_FROM_LAB).pow(3)
        linear = _mix(lms, _RGB_FROM_LMS).clamp(0.0, 1.0)
        return linear_to_srgb(linear) * 2.0 - 1.0


class SRGB(ColorSpace):
    """sRGB as it is, in [-1, 1]: the choice for training from scratch."""

    name, signed = "srgb", True

    def __init__(self, mean: Sequence[float] = (0.0, 0.0, 0.0), std: float = 1.0) -> None:
        super().__init__(mean, std)

    @staticmethod
    def _from_srgb(images: Tensor) -> Tensor:
        return to_signed(images)

    def _to_srgb(self, values: Tensor) -> Tensor:
        return values.clamp(-1.0, 1.0)


def color_from_dict(data: dict[str, Any]) -> ColorSpace:
    """The color space that :meth:`ColorSpace.to_dict` described.

    Raises:
        ValueError: if the name is unknown or a field is missing.
    """
    try:
        if not all(type(value) in (int, float) for value in (*data["mean"], data["std"])):
            raise TypeError
        return SPACES[data["name"]](data["mean"], data["std"])
    except (KeyError, TypeError, OverflowError) as error:
        raise ValueError(
            f"color: cannot read {str(data)[:200]}; expected name (one of {sorted(SPACES)}), mean, std"
        ) from error


def color_statistics(space: type[ColorSpace], images: Tensor) -> tuple[int, Tensor, float]:
    """Sums over pixels for a fitted normalization: pixels, sum per channel (3,) and sum of squares, in float64."""
    values = space.plain(images).double()
    return values.numel() // 3, values.sum(dim=(0, 2, 3)), values.square().sum().item()


def srgb_to_linear(values: Tensor) -> Tensor:
    """The sRGB transfer function undone; [0, 1] to [0, 1]. Values outside are clamped."""
    values = values.clamp(0.0, 1.0)
    return torch.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055).pow(2.4))


def _to_linear(images: Tensor) -> Tensor:
    """sRGB, uint8 or in [-1, 1], to linear RGB in [0, 1]."""
    if images.dtype != torch.uint8:
        return srgb_to_linear(images * 0.5 + 0.5)
    # Eight bits have 256 values: looking them up is much faster than computing each.
    levels = srgb_to_linear(torch.arange(256, device=images.device) / 255)
    return levels.index_select(0, images.flatten().int()).view(images.shape)


def linear_to_srgb(values: Tensor) -> Tensor:
    """The sRGB transfer function; [0, 1] to [0, 1]."""
    # The floor keeps the gradient of the unused branch finite.
    return torch.where(values <= 0.0031308, values * 12.92, 1.055 * values.clamp(min=1e-6).pow(1.0 / 2.4) - 0.055)


def _cube_root(values: Tensor) -> Tensor:
    """The cube root of values >= 0, with a straight line below 1e-9, where its slope would become infinite."""
    tiny = 1e-9
    # The line is the smaller of the two below the point where they meet.
    return torch.minimum(values * tiny ** (-2.0 / 3.0), _power(values.clamp(min=tiny), 1.0 / 3.0))


def _power(values: Tensor, exponent: float) -> Tensor:
    """Values >= 0 to a power > 0; torch's own takes ten times as long on a CPU."""
    return torch.log(values).mul_(exponent).exp_()


@lru_cache(maxsize=128)
def constant(values: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers on a device; made once, because a GPU and the processor wait for one another while they are copied."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)


def _mix(images: Tensor, matrix: Matrix) -> Tensor:
    """Multiply the channels of (B, 3, H, W) by a 3 x 3 matrix."""
    weight = constant(matrix, images.dtype, images.device)
    return (weight @ images.flatten(2)).view_as(images)


def to_signed(images: Tensor) -> Tensor:
    """uint8 images to float32 in [-1, 1]; others are so already."""
    return images.float() / 127.5 - 1.0 if images.dtype == torch.uint8 else images


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] to uint8, the inverse of :func:`to_signed`."""
    return ((images.detach().float().clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8)
