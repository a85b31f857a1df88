"""The finetuning objective: a flow loss whose variance the frozen model takes away (Sec. 5.2, Eq. 18-22).

``x_0^L = s A z_0`` is an image lifted from its own latents. The frozen converted model sees it under the same noise as the
student sees the image itself, so that both err alike where the noise hides the answer::

    d   = x_0 - xhat_0          d_L = x_0^L - xhat_0^L
    lam = clamp(<d, d_L> / |d_L|^2, 0, 1)
    w   = alpha^2 / (alpha^2 + (kappa sigma)^2),  alpha = 1 - sigma
    L_VR = mean |d - (1 - w) lam d_L|^2 / max(sigma, floor)^2
    L_P  = mean(w lam_map / max(sigma, floor)^2 * perceptual(xhat_0, x_0))

Where ``1 - w`` is below a threshold, the frozen model need not be asked: as ``lam <d, d_L> >= lam^2 |d_L|^2``, an image's
flow loss lies between ``w^2`` and 1 times that without the reduction, so that leaving it out adds at most ``1 / w^2 - 1`` of it.

Where the published code differs from the paper this follows the code: inner product and norm are means over the pixels of
one color channel of one patch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from liftkit.data.batch import pick
from liftkit.finetune.bands import BandError
from liftkit.lift import Lift
from liftkit.tokens import unpatchify

Velocity = Callable[[Tensor, Tensor], Tensor]
"""A flow model with its conditioning bound: state (B, 3, H, W) and sigma (B,) to the velocity, shaped like the state."""
Perceptual = Callable[[Tensor, Tensor], Tensor]
"""Two sRGB images (B, 3, H, W) in [-1, 1] to a map of their distance, (B, 1, H, W)."""

NORM_FLOOR = 1e-4


class Asked(NamedTuple):
    """Rows of a batch, of which not all need the reference.

    Args:
        rows: numbers of those whose loss has its error; see :func:`rows_to_ask`.
        seen: numbers of those that it runs on, ``rows`` among them; its conditioning is that of these alone.
    """

    rows: list[int]
    seen: list[int]


def asymflow_loss(
    student: Velocity,
    reference: Velocity,
    x0: Tensor,
    latent_tokens: Tensor,
    sigma: Tensor,
    noise: Tensor,
    lift: Lift,
    *,
    kappa: float | None = 0.3,
    weight: float = 5.0,
    sigma_floor: float = 0.05,
    perceptual: Perceptual | None = None,
    perceptual_weight: float = 1.0,
    bands: BandError | None = None,
    asked: Asked | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Flow loss with variance reduction and perceptual correction, in float32.

    Args:
        student: the model that learns.
        reference: the frozen converted model; no gradient passes through it.
        x0: images in the lift's color space, (B, 3, H, W).
        latent_tokens: normalized latents of the same images, (B, N, r), elements in (c, row, col) order.
        sigma: noise levels in [0, 1], (B,).
        noise: standard normal, shaped like ``x0``; both models see it.
        lift: A and s.
        kappa: how soon the plain flow loss returns as the noise falls: w rises from 0 at sigma = 1 to 1 at sigma = 0.
            None keeps the whole reduction at every noise level (w = 0), and the perceptual term silent.
        weight: of the flow term (the published 5).
        sigma_floor: least sigma in the weight 1 / sigma^2 of an error in x_0.
        perceptual: a spatial distance of sRGB images in [-1, 1].
        perceptual_weight: of its term (the paper's 0.2 times 5).
        bands: weighs what is squared by band of its spectrum; None counts all pixels alike, as the paper does.
        asked: rows of the batch that the reference is asked for; None: all. The others have the plain flow loss.

    Returns:
        The loss, (), and detached metrics: ``flow``, ``lambda`` in [0, 1], 0 for rows not asked for, and,
        with a perceptual term, ``perceptual``.
    """
    sigma = sigma.float()
    level = sigma.view(-1, 1, 1, 1)
    lifted = unpatchify(lift.raise_tokens(latent_tokens.float()), lift.patch_size, *x0.shape[-2:])
    with torch.no_grad():
        reference_error = _reference_error(reference, lifted, noise, sigma, asked)
    denoised = _denoised(student, x0, noise, sigma)
    error = x0 - denoised
    share = correlation(error.detach(), reference_error, lift.patch_size)
    correction = _correction(level, kappa)
    residual = error - _by_patch((1.0 - correction) * share, reference_error)
    precision = level.clamp(min=sigma_floor).square().reciprocal()
    squares = residual.square().mean(dim=(1, 2, 3)) if bands is None else bands(residual, sigma)
    flow = (squares * precision.flatten()).mean()
    loss, metrics = weight * flow, {"flow": flow.detach(), "lambda": share.mean()}
    if perceptual is not None and kappa is not None:
        gate = correction * share.square().mean(dim=1, keepdim=True).sqrt() * precision
        term = _by_patch(gate, perceptual(lift.color.decode(denoised), lift.color.decode(x0))).mean()
        loss, metrics["perceptual"] = loss + perceptual_weight * term, term.detach()
    return loss, metrics


def flow_loss(
    student: Velocity,
    x0: Tensor,
    sigma: Tensor,
    noise: Tensor,
    *,
    weight: float = 1.0,
    sigma_floor: float = 0.05,
    bands: BandError | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The plain flow loss, ``mean |u - uhat|^2``, with sigma floored where it divides; for comparison.

    Args:
        student: the model that learns.
        x0: the data that it models: images in a color space, or latents.
        sigma, noise, sigma_floor, bands: see :func:`asymflow_loss`.
        weight: of the loss.

    Returns:
        The loss, (), and the metric ``flow``.
    """
    sigma = sigma.float()
    error = x0 - _denoised(student, x0, noise, sigma)
    error = error / sigma.clamp(min=sigma_floor).view(-1, 1, 1, 1)
    flow = error.square().mean() if bands is None else bands(error, sigma).mean()
    return weight * flow, {"flow": flow.detach()}


def correlation(error: Tensor, reference_error: Tensor, patch: int) -> Tensor:
    """``lam``: the share of the reference's error that the student's has in it, for each color channel of each patch.

    Args:
        error, reference_error: (B, 3, H, W).
        patch: side of a patch, in pixels.

    Returns:
        (B, 3, h, w) in [0, 1].
    """
    mean = torch.nn.functional.avg_pool2d
    product, norm = mean(error * reference_error, patch), mean(reference_error.square(), patch)
    return (product / norm.clamp(min=NORM_FLOOR)).clamp(0.0, 1.0)


def rows_to_ask(sigma: Sequence[float], kappa: float | None, below: float) -> list[int]:
    """The rows whose share ``1 - w`` of the reference's error is not below a threshold.

    Args:
        sigma: noise levels in [0, 1], on the host.
        kappa: see :func:`asymflow_loss`.
        below: the threshold.
    """
    if kappa is None or below == 0:
        return list(range(len(sigma)))
    # (kappa sigma)^2 / (alpha^2 + (kappa sigma)^2) >= below, without dividing by what may be zero.
    noise, signal = ([(kappa * each) ** 2 for each in sigma], [(1.0 - each) ** 2 for each in sigma])
    return [row for row, (n, a) in enumerate(zip(noise, signal)) if n * (1.0 - below) >= below * a and n > 0]


def _reference_error(reference: Velocity, lifted: Tensor, noise: Tensor, sigma: Tensor, asked: Asked | None) -> Tensor:
    """``d_L`` (B, 3, H, W), zero in the rows that the reference is not asked for."""
    if asked is None:
        return lifted - _denoised(reference, lifted, noise, sigma)
    error = torch.zeros_like(lifted)
    if asked.seen:
        seen, theirs, level = (pick(each, asked.seen) for each in (lifted, noise, sigma))
        found = seen - _denoised(reference, seen, theirs, level)
        for place, row in enumerate(asked.seen):
            if row in asked.rows:
                error[row] = found[place]
    return error


def _correction(level: Tensor, kappa: float | None) -> Tensor:
    """``w`` in [0, 1] of noise levels."""
    if kappa is None:
        return torch.zeros_like(level)
    alpha = (1.0 - level).square()
    return alpha / (alpha + (kappa * level).square()).clamp(min=torch.finfo(level.dtype).tiny)


def _denoised(model: Velocity, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """``xhat_0 = x_t - sigma u``: what a model takes noised data for."""
    level = sigma.view(-1, 1, 1, 1)
    x_t = torch.lerp(x0, noise, level)
    return torch.addcmul(x_t, level, model(x_t, sigma).float(), value=-1.0)


def _by_patch(factors: Tensor, images: Tensor) -> Tensor:
    """Images (B, C, H, W) times one factor for each of their patches, (B, C, h, w)."""
    rows, columns = factors.shape[-2:]
    patches = images.unflatten(-1, (columns, -1)).unflatten(-3, (rows, -1))
    return (patches * factors[..., :, None, :, None]).flatten(-2).flatten(-3, -2)
