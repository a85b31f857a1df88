"""The network between the projections, left out: what remains is small, and is all that a conversion changes.

A transformer is ``v = W_out f(W_in z + b, tau) + b_out``, with everything between the projections in f. A conversion keeps
f bit for bit and puts ``W_in' = W_in A^T`` and ``W_out' = A W_out`` around it. Theorem 1 says nothing of f but that it is
the same on both sides, so that any f may stand in for it: here one that mixes tokens, features and time, and costs
nothing. Patches are cut and flattened as the transformers themselves do it, not by the permutations that the surgery uses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from liftkit.asymflow import calibrate, recover_velocity
from liftkit.conversion.proof import Pair, Proof, Read
from liftkit.models.spec import LIFTED, Architecture, Projection
from liftkit.models.surgery import BASIS, RawChannels, lifted_names
from liftkit.progress import Observer, Silent
from liftkit.tokens import TokenOrder, patchify, unpatchify


def on_projections(pair: Pair, observer: Observer | None = None) -> Proof:
    """What tied runs through the projections alone find, with a toy network between them."""
    changed, full = lifted_names(pair.spec), dict[str, Tensor]()

    def latent(name: str) -> Tensor | None:
        # What is copied may have been rounded, and is the same for both.
        return (pair.original if name in changed else pair.stored)(name)

    def pixel(read: Read) -> ToyNetwork:
        lift = pair.lift
        return ToyNetwork(
            pair.spec, read, lift.latent_patch, lift.rank, lift.fold, read(BASIS), lift.scale, source.unit
        )

    def exact() -> ToyNetwork:
        full.update(pair.products(torch.float32))
        return pixel(lambda name: full[name] if name in full else pair.stored(name))

    source = ToyNetwork(pair.spec, latent, pair.lift.latent_patch, pair.lift.rank)
    with (observer or Silent()).stage("prove: the projections", 3 * pair.steps, "steps") as advance:
        return pair.walk("projections", lambda: source, lambda: pixel(pair.stored), exact, advance)


@dataclass
class ToyNetwork:
    """A flow of two projections with a fixed function between them; has the face of a
    :class:`liftkit.models.flow.FlowModel`.

    Args:
        spec: the architecture.
        read: a stored tensor by name, or None where there is none.
        patch: side of a token's patch on the (folded) grid.
        rank: r.
        fold: f of ``pixel_unshuffle`` for a pixel model, 1 for a latent one.
        basis: A as it is stored, for a pixel model.
        scale: s, for a pixel model.
        unit: size of the features, which has to be the same on both sides; a latent model's own if not given.
    """

    spec: Architecture
    read: Read
    patch: int
    rank: int
    fold: int = 1
    basis: Tensor | None = None
    scale: float = 1.0
    unit: float = 0.0

    def __post_init__(self) -> None:
        self._inputs = [part for p in self.spec.inputs for part in self._load(p, "input")]
        # What follows the first block is a learned variance, which nobody reads.
        self._outputs = [self._load(p, "output")[0] for p in self.spec.outputs]
        if not self.unit:
            # Of W z for a standard normal z.
            self.unit = sum(weight.square().sum(1).mean().item() for weight, _, _ in self._inputs) ** 0.5

    def velocity(self, x_t: Tensor, sigma: Tensor, **_: Any) -> Tensor:
        """u = eps - x_0 of a state (B, C, H, W) in float64; other conditioning is ignored."""
        folded = F.pixel_unshuffle(x_t, self.fold) if self.fold > 1 else x_t
        height, width = folded.shape[-2:]
        gain, tau = calibrate(sigma, self.scale) if self.basis is not None else (torch.ones_like(sigma), sigma)
        hidden = sum(
            F.linear(patchify(folded * gain.reshape(-1, 1, 1, 1), self.patch, order), weight, bias)
            for weight, bias, order in self._inputs
        )
        assert isinstance(hidden, Tensor)
        velocity = sum(
            unpatchify(
                F.linear(_between(hidden / self.unit, tau, weight.shape[1]), weight, bias),
                self.patch,
                height,
                width,
                order,
            )
            for weight, bias, order in self._outputs
        )
        assert isinstance(velocity, Tensor)
        if self.basis is not None:
            velocity = self._recover(velocity, folded, sigma)
        return F.pixel_shuffle(velocity, self.fold) if self.fold > 1 else velocity

    def _recover(self, u_cal: Tensor, folded: Tensor, sigma: Tensor) -> Tensor:
        assert self.basis is not None
        order = self.spec.state_order
        predicted, state = (patchify(each, self.patch, order) for each in (u_cal, folded))
        velocity = recover_velocity(predicted, state, sigma, self.basis, self.scale)
        height, width = folded.shape[-2:]
        return unpatchify(velocity, self.patch, height, width, order)

    def _load(self, projection: Projection, side: str) -> list[tuple[Tensor, Tensor | None, TokenOrder]]:
        """Each lifted block as a projection of its own: further ones take the state too, for any clean image would do."""
        weight, bias = (self.read(f"{projection.path}.{kind}") for kind in ("weight", "bias"))
        assert weight is not None
        raw = RawChannels(self.spec, projection, side, self.patch)
        size = self.rank if self.basis is None else len(self.basis)
        weight, bias = weight.double(), None if bias is None else bias.double()
        weight = weight.flatten(1)
        width = raw.width(weight.shape)
        blocks = zip(raw.blocks(width, size), raw.places(width, size))
        result: list[tuple[Tensor, Tensor | None, TokenOrder]] = []
        for rows in (rows for block, rows in blocks if block == LIFTED):
            if side == "input":
                result.append((weight[:, rows], None if result else bias, projection.order))
            else:
                result.append((weight[rows], None if bias is None else bias[rows], projection.order))
        return result


def _between(hidden: Tensor, tau: Tensor, width: int) -> Tensor:
    """Any function will do: (B, N, hidden) and the time to (B, N, width), bounded."""
    mixed = hidden + hidden.mean(1, keepdim=True) + hidden.roll(1, -1)
    bounded = torch.tanh(mixed / 2 + tau.reshape(-1, 1, 1))
    return bounded[..., torch.arange(width) % hidden.shape[-1]]
