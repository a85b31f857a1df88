"""What a recipe's objective may be made of, by name: perceptual distances and further terms of the loss.

Both are plain dictionaries, and may be added to from outside before a recipe is read. This module imports no torch, so that
recipes are checked at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from liftkit.finetune.objective import Perceptual

    Term = Callable[[Tensor, Tensor, Tensor], Tensor]


def _gradient(vae: Any, device: str) -> Perceptual:  # noqa: ARG001
    from liftkit.finetune.perceptual import gradient_distance

    return gradient_distance


def _vae(vae: Any, device: str) -> Perceptual:  # noqa: ARG001
    from liftkit.finetune.perceptual import VaeFeatures

    return VaeFeatures(vae)


def _lpips(vae: Any, device: str) -> Perceptual:  # noqa: ARG001
    from liftkit.finetune.perceptual import lpips_distance

    return lpips_distance(device)


PERCEPTUAL: dict[str, Callable[[Any, str], Perceptual]] = {"lpips": _lpips, "vae": _vae, "gradient": _gradient}
"""``objective.perceptual``: ``(vae or None, device) -> distance``, a map (B, 1, H, W) >= 0 of two sRGB images in [-1, 1]."""
TERMS: dict[str, Term] = {}
"""``objective.terms``: ``(estimate of x_0, x_0, sigma (B,)) -> scalar``, in the space that the student models, with
gradients. The recipe gives each a weight."""


def make_perceptual(name: str, vae: Any | None, device: str) -> Perceptual | None:
    """The distance of a recipe's ``objective.perceptual``.

    Args:
        name: ``none``, or one of :data:`PERCEPTUAL`.
        vae: the checkpoint's own VAE, for ``vae``; other distances may go without.
        device: where images will be.

    Raises:
        UsageError: if what it needs is not installed or cannot be had.
    """
    return None if name == "none" else PERCEPTUAL[name](vae, device)
