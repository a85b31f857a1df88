"""Tied runs: a latent model and its pixel twin from noise that is the same in the latent's subspace, on grids related by
``tau = k(sigma) sigma``, and how far they come apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from liftkit.asymflow import calibrate, lift_sigma
from liftkit.lift import Lift
from liftkit.models.flow import euler
from liftkit.models.spec import Architecture
from liftkit.tokens import patchify, unpatchify


class TiedRun:
    """Tied noise, tied grids and shared conditioning for a latent model and its pixel twin.

    Args:
        spec: the architecture.
        config: of the latent transformer.
        lift: between the two.
        steps: of Euler's method.
        seed: of noise and conditioning.
        device: where the models are.
        dtype: of states, clocks and the recovery of velocities. In float64 what is left is the networks' own rounding, the
            same in both. In float32 their times differ by some units in the last place, which an embedding of a thousand
            times that turns into 1e-5 to 1e-4 of the result.
    """

    def __init__(
        self,
        spec: Architecture,
        config: dict[str, Any],
        lift: Lift,
        steps: int,
        seed: int,
        device: str = "cpu",
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self.lift, self.patch = lift, spec.latent_patch(config)
        if device.startswith("mps"):  # which has no float64
            dtype = torch.float32
        generator = torch.Generator().manual_seed(seed)
        rows, columns = self.grid = spec.proof_grid
        noise = torch.randn(1, 3, rows * lift.patch_size, columns * lift.patch_size, generator=generator)
        conditioning = spec.conditioning(config, 1, generator)
        self.noise = noise.to(device, dtype)
        self.conditioning = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in conditioning.items()}
        self.basis = lift.basis.to(device, dtype)
        self.taus = torch.linspace(1.0, 0.0, steps + 1, device=device, dtype=dtype)

    def sample_latent(self, flow: Any) -> list[Tensor]:
        """Latent tokens z_tau after every step, starting at A^T eps."""
        start = patchify(self.noise, self.lift.patch_size) @ self.basis
        rows, columns = self.grid
        trace: list[Tensor] = []
        state = unpatchify(start, self.patch, rows * self.patch, columns * self.patch)
        euler(flow, state, self.taus, self.conditioning, trace)
        return [patchify(state, self.patch) for state in trace]

    def deviation(self, flow: Any, reference: list[Tensor]) -> float:
        """Largest relative deviation of A^T (k x_t) from z_tau over the steps, and of x_0 from s A z_0."""
        trace: list[Tensor] = []
        sigmas = lift_sigma(self.taus, self.lift.scale)
        euler(flow, self.noise, sigmas, self.conditioning, trace)
        worst = 0.0
        gains, _ = calibrate(sigmas[1:], self.lift.scale)
        for state, gain, latent in zip(trace, gains, reference):
            projected = gain * patchify(state, self.lift.patch_size) @ self.basis
            worst = max(worst, relative(projected, latent))
        lifted = self.lift.raise_tokens(reference[-1])
        return max(worst, relative(patchify(trace[-1], self.lift.patch_size), lifted))


def relative(value: Tensor, reference: Tensor) -> float:
    """max |value - reference| / max |reference|; infinite if anything is not finite."""
    error = ((value - reference).abs().max() / reference.abs().max()).item()
    return error if error == error else float("inf")
