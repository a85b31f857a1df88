"""Second moments of (z, x) token pairs: all that the fits need, additive over images, shards and machines."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

LEVELS = 256
"""Tokens in a block. The sum of so many products of two numbers up to 255 is below 2^24, where float32 holds all whole numbers."""


class TokenMoments:
    """Running uncentered moments in float64, whatever the tokens' dtype.

    Args:
        latent_dim: r, numbers in a latent token.
        pixel_dim: D, numbers in a pixel token.

    Attributes:
        count: number of token pairs.
        images: number of images they came from.
        latent_sum: sum z, (r,).
        pixel_sum: sum x, (D,).
        latent_gram: G_z = sum z z^T, (r, r).
        pixel_gram: G_x = sum x x^T, (D, D).
        cross: C = sum z x^T, (r, D).
    """

    SUMS = ("latent_sum", "pixel_sum", "latent_gram", "pixel_gram", "cross")

    def __init__(self, latent_dim: int, pixel_dim: int) -> None:
        if latent_dim < 1 or pixel_dim < latent_dim:
            raise ValueError(f"moments: need 1 <= latent_dim <= pixel_dim, got {latent_dim} and {pixel_dim}")
        self.latent_dim, self.pixel_dim = latent_dim, pixel_dim
        self.count = 0
        self.images = 0
        self.latent_sum = torch.zeros(latent_dim, dtype=torch.float64)
        self.pixel_sum = torch.zeros(pixel_dim, dtype=torch.float64)
        self.latent_gram = torch.zeros(latent_dim, latent_dim, dtype=torch.float64)
        self.pixel_gram = torch.zeros(pixel_dim, pixel_dim, dtype=torch.float64)
        self.cross = torch.zeros(latent_dim, pixel_dim, dtype=torch.float64)

    def update(self, latent_tokens: Tensor, pixel_tokens: Tensor) -> None:
        """Add token pairs.

        Args:
            latent_tokens: (B, N, r).
            pixel_tokens: (B, N, D), token for token the same patches; uint8 stands for [-1, 1], without rounding.

        Raises:
            ValueError: if shapes disagree or a value is not finite (nothing is added then).
        """
        if latent_tokens.shape[:-1] != pixel_tokens.shape[:-1]:
            raise ValueError(
                f"moments: {tuple(latent_tokens.shape)} latent and {tuple(pixel_tokens.shape)} pixel tokens do not pair up"
            )
        if (latent_tokens.shape[-1], pixel_tokens.shape[-1]) != (self.latent_dim, self.pixel_dim):
            raise ValueError(
                f"moments: tokens of {latent_tokens.shape[-1]} and {pixel_tokens.shape[-1]} numbers; "
                f"these moments are of {self.latent_dim} and {self.pixel_dim}"
            )
        latents = latent_tokens.flatten(0, -2).to(self.cross)
        pixels = pixel_tokens.flatten(0, -2).to(self.cross.device)
        if not len(latents):
            return
        blocks = _level_blocks(pixels) if pixels.dtype == torch.uint8 else None
        if blocks is not None:
            pixels = blocks.flatten(0, 1)[: len(pixels)].to(self.cross).div_(255)
        pixels = pixels.to(self.cross)
        latent_sum, pixel_sum = latents.sum(dim=0), pixels.sum(dim=0)
        # A sum is finite where all its terms are; a GPU is waited for once.
        if not torch.isfinite(latent_sum.sum() + pixel_sum.sum()):
            raise ValueError("moments: a token holds NaN or infinity")
        self.count += len(latents)
        self.images += latent_tokens.shape[0] if latent_tokens.ndim > 2 else 1
        self.latent_sum += latent_sum
        self.pixel_sum += pixel_sum
        self.latent_gram.addmm_(latents.T, latents)
        self.cross.addmm_(latents.T, pixels)
        _add_gram(self.pixel_gram, pixels, blocks)

    def __add__(self, other: TokenMoments) -> TokenMoments:
        """Moments of both streams together."""
        if not isinstance(other, TokenMoments):
            return NotImplemented
        if (self.latent_dim, self.pixel_dim) != (other.latent_dim, other.pixel_dim):
            raise ValueError(
                f"moments: cannot add moments of ({self.latent_dim}, {self.pixel_dim}) and "
                f"({other.latent_dim}, {other.pixel_dim})"
            )
        total = TokenMoments(self.latent_dim, self.pixel_dim)
        total.count, total.images = self.count + other.count, self.images + other.images
        for name in self.SUMS:
            setattr(total, name, getattr(self, name) + getattr(other, name))
        return total

    def to(self, device: torch.device | str) -> TokenMoments:
        """The same on a device."""
        result = TokenMoments(self.latent_dim, self.pixel_dim)
        result.count, result.images = self.count, self.images
        for name in self.SUMS:
            setattr(result, name, getattr(self, name).to(device))
        return result

    def of_latents(self) -> TokenMoments:
        """Moments of the pairs (z, z): latents in the place of pixels, for a subspace of theirs."""
        result = TokenMoments(self.latent_dim, self.latent_dim)
        result.count, result.images = self.count, self.images
        result.latent_sum = result.pixel_sum = self.latent_sum
        result.latent_gram = result.pixel_gram = result.cross = self.latent_gram
        return result

    def save(self, path: str | Path) -> None:
        """Write ``.safetensors``, atomically."""
        from liftkit.checkpoint.files import write_safetensors

        tensors = {name: getattr(self, name) for name in self.SUMS}
        counts = {"count": torch.tensor(self.count), "images": torch.tensor(self.images)}
        write_safetensors(Path(path), tensors | counts, {"format": "liftkit.moments"})

    @classmethod
    def load(cls, path: str | Path) -> TokenMoments:
        """Read what :meth:`save` wrote.

        Raises:
            UsageError: if the file is missing, truncated or holds no moments.
        """
        from liftkit.checkpoint.files import read_safetensors
        from liftkit.errors import UsageError

        tensors, _ = read_safetensors(Path(path))
        missing = {"count", "images", *cls.SUMS} - tensors.keys()
        if missing:
            raise UsageError(f"{path}: no moments: {', '.join(sorted(missing))} missing")
        try:
            counts = [tensors[name] for name in ("count", "images")]
            if any(count.numel() != 1 or count.dtype != torch.int64 for count in counts):
                raise ValueError("count and images have to be whole numbers")
            return cls.checked(int(counts[0]), int(counts[1]), {name: tensors[name] for name in cls.SUMS})
        except ValueError as error:
            raise UsageError(f"{path}: no moments that this version reads ({error})") from error

    @classmethod
    def checked(cls, count: int, images: int, sums: Mapping[str, Tensor]) -> TokenMoments:
        """Moments from what a file holds.

        Raises:
            ValueError: if it cannot be moments: wrong dtypes or shapes, numbers that are not finite, Gram matrices that
                are none, counts that do not go together.
        """
        if sums["cross"].ndim != 2:
            raise ValueError(f"cross is of shape {tuple(sums['cross'].shape)}, expected (r, D)")
        moments = cls(*sums["cross"].shape)
        for name in cls.SUMS:
            value, expected = sums[name], getattr(moments, name)
            if value.dtype != expected.dtype or value.shape != expected.shape:
                raise ValueError(
                    f"{name} is {value.dtype} {tuple(value.shape)}, expected {expected.dtype} {tuple(expected.shape)}"
                )
            # Beyond it squares and products overflow.
            if value.numel() and not value.abs().max() <= 1e100:
                raise ValueError(f"{name} holds numbers that are not finite, or huge")
            setattr(moments, name, value)
        for gram in (moments.latent_gram, moments.pixel_gram):
            if not torch.allclose(gram, gram.T, rtol=1e-6, atol=1e-6 * gram.diagonal().abs().max().item()):
                raise ValueError("a Gram matrix is not symmetric")
            if (gram.diagonal() < 0).any():
                raise ValueError("a Gram matrix has a negative diagonal")
        if not 0 <= images <= count <= 2**53 or (images == 0) != (count == 0):
            raise ValueError(f"{count} tokens of {images} images")
        moments.count, moments.images = count, images
        return moments


def _level_blocks(tokens: Tensor) -> Tensor:
    """Tokens of eight bits (n, d) as odd numbers from -255 to 255 in float32, (n / LEVELS, LEVELS, d), with zeros behind."""
    count, dim = tokens.shape
    blocks = torch.zeros(-(-count // LEVELS), LEVELS, dim, device=tokens.device)
    blocks.flatten(0, 1)[:count].copy_(tokens).mul_(2).sub_(255)
    return blocks


def _add_gram(gram: Tensor, tokens: Tensor, blocks: Tensor | None) -> None:
    """``G += T^T T`` of tokens T (n, d), block by block: only those on and above the diagonal have to be computed.

    Args:
        gram: G, (d, d).
        tokens: T.
        blocks: T by :func:`_level_blocks`, if it was of eight bits. Sums of so many products are whole numbers that float32 holds
            exactly, and it takes half as long as float64; on GPUs of consumers 1/64.
    """
    for columns in torch.arange(len(gram)).chunk(4):
        first, end = int(columns[0]), int(columns[-1]) + 1
        if blocks is None:
            gram[first:end, first:].addmm_(tokens[:, first:end].T, tokens[:, first:])
        else:
            with torch.autocast(gram.device.type, enabled=False):
                products = torch.bmm(blocks[..., first:end].mT, blocks[..., first:])
            exact = products.sum(dim=0, dtype=gram.dtype)
            gram[first:end, first:].add_(exact, alpha=255**-2)
        gram[end:, first:end] = gram[first:end, end:].T
