"""What of a pixel velocity lies inside of the subspace, as the latent velocity that it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from liftkit.asymflow import at_least_float32, calibrate
from liftkit.models.layout import Layout
from liftkit.tokens import patchify, unpatchify


class LatentPart:
    """The latent velocity v inside of a pixel velocity u at one noise level: ``A^T u = s k v + (1 - s) k A^T x_t`` (Eq. 17).

    Args:
        transformer: a pixel twin.
        state: x_t in its layout, stacked where that is a list.
        time: as the caller passes it; one for all samples.
    """

    def __init__(self, transformer: Any, state: Tensor, time: Tensor) -> None:
        self.spec, self.config = transformer.architecture, transformer.config
        self.basis, self.scale = transformer.lift.basis, self.config.lift_scale
        sigma = self.spec.clock.sigma(at_least_float32(time).reshape(-1)[0])
        self.gain = calibrate(sigma, self.scale)[0].to(state.device)
        self.state = [tokens @ self.basis for tokens in self._tokens(state)]

    def of(self, velocity: Tensor) -> Tensor:
        """v of u, in the layout of the latent model."""
        parts = [self._latent(tokens @ self.basis, state) for tokens, state in zip(self._tokens(velocity), self.state)]
        return self._joined(parts, velocity)

    def exchanged(self, velocity: Tensor, latent: Tensor) -> Tensor:
        """u with another v inside; what is outside of the subspace stays."""
        parts = []
        for tokens, state, wanted in zip(self._tokens(velocity), self.state, self._tokens(latent)):
            added = wanted - self._latent(tokens @ self.basis, state)
            parts.append(tokens + (self.scale * self.gain * added) @ self.basis.T)
        return self._joined(parts, velocity)

    def _latent(self, inside: Tensor, state: Tensor) -> Tensor:
        # Signs of outputs cancel in norms, but not against the state.
        return (inside - self.spec.sign * (1.0 - self.scale) * self.gain * state) / (self.scale * self.gain)

    def _tokens(self, value: Tensor) -> list[Tensor]:
        value = at_least_float32(value)
        if self.spec.layout is Layout.TOKENS:
            return [value]
        return [patchify(part, self.spec.cell(self.config)) for part in self.spec.layout.split(value)]

    def _joined(self, tokens: list[Tensor], like: Tensor) -> Tensor:
        layout, cell = self.spec.layout, self.spec.cell(self.config)
        if layout is Layout.TOKENS:
            return tokens[0]
        sizes = [part.shape[-2:] for part in layout.split(like)]
        joined = layout.join([unpatchify(each, cell, *size) for each, size in zip(tokens, sizes)])
        return torch.stack(joined) if isinstance(joined, list) else joined
