"""Asymmetric flow: the velocity parameterization and the calibration of scale and time (arXiv 2605.12964).

A pixel state is ``x_t = (1 - sigma) x_0 + sigma eps`` with velocity ``u = eps - x_0``. The network predicts
the *rank-asymmetric* velocity ``u_A = P_A eps - x_0``, where ``P_A = A A^T`` projects on the r columns of an
orthonormal basis A (D, r): data at full dimension, noise in the subspace alone. The full velocity follows
without error (Eq. 5)::

    u = P_A u_A + (I - P_A)(x_t + u_A) / sigma

A network lifted from latents, ``x_0 = s A z_0``, expects the noisier or cleaner latents of its own clock,
``z_tau = (1 - tau) z_0 + tau eps'``. Both agree when the state is scaled and the time is given (Eq. 11-17)::

    k   = 1 / (s + (1 - s) sigma)        A^T (k x_t) = z_tau
    tau = k sigma

Everything here acts on tokens alone, in float32 at least, and is pure torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

SIGMA_MIN = 1e-4


def calibrate(sigma: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Input gain and network time of a noise level (Eq. 11-14).

    Args:
        sigma: noise levels in [0, 1], any shape; computed in float32 at least.
        scale: the lift scale s > 0.

    Returns:
        ``gain`` k = 1 / (s + (1 - s) sigma) and ``tau`` = k sigma, both shaped like ``sigma``.
    """
    sigma = at_least_float32(sigma)
    gain = 1.0 / (scale + (1.0 - scale) * sigma)
    return gain, gain * sigma


def lift_sigma(tau: Tensor, scale: float) -> Tensor:
    """The pixel noise level whose network time is ``tau``: sigma = s tau / (1 + (s - 1) tau).

    The inverse of :func:`calibrate`; on a grid it multiplies the shift by s.
    """
    tau = at_least_float32(tau)
    return scale * tau / (1.0 + (scale - 1.0) * tau)


def recover_velocity(
    u_cal: Tensor,
    x_t: Tensor,
    sigma: Tensor,
    basis: Tensor,
    scale: float,
    sigma_min: float = SIGMA_MIN,
) -> Tensor:
    """The full velocity from a calibrated prediction ``u_cal = P_A eps - x_0 / s`` (Eq. 17).

    ::

        u = s k P u_cal + (1 - s k)/sigma P x_t + (I - P)(x_t + s u_cal) / sigma

    ``s = 1`` gives Eq. 5. The terms are gathered so that one projection, ``P v = (v A) A^T``, serves both; and
    ``1 - s k = (1 - s) k sigma``, which does not cancel at small sigma.

    Args:
        u_cal: tokens (B, N, D), what the network says.
        x_t: tokens (B, N, D), the state before the input gain.
        sigma: (B,) in [0, 1], or any shape that broadcasts against (B, N, D) after one unsqueeze per missing
            dimension; one noise level per sample.
        basis: A, (D, r), orthonormal columns.
        scale: the lift scale s > 0.
        sigma_min: floor of the divisions by sigma.

    Returns:
        u = eps - x_0, (B, N, D), in float32 or float64.

    Raises:
        ValueError: if the shapes disagree.
    """
    if u_cal.shape != x_t.shape or u_cal.shape[-1] != basis.shape[0]:
        raise ValueError(
            f"recover_velocity: u_cal {tuple(u_cal.shape)} and x_t {tuple(x_t.shape)} must agree and end in the "
            f"basis' pixel dimension, {basis.shape[0]}"
        )
    u_cal, x_t, sigma = at_least_float32(u_cal), at_least_float32(x_t), at_least_float32(sigma)
    dtype = torch.float64 if torch.float64 in (u_cal.dtype, x_t.dtype, sigma.dtype, basis.dtype) else torch.float32
    basis = basis.to(dtype)
    sigma = sigma.reshape(sigma.shape + (1,) * (x_t.ndim - sigma.ndim))
    gain, _ = calibrate(sigma, scale)
    floored = sigma.clamp(min=sigma_min)
    outside = (x_t + scale * u_cal) / floored
    inside = gain * (scale * u_cal + (1.0 - scale) * (sigma / floored) * x_t)
    return outside + ((inside - outside).to(dtype) @ basis) @ basis.T


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor itself when it is float32 or float64, else in float32."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
