"""What a proof compares, and what it found: one walk of tied runs serves conversions, adapters and ``liftkit verify``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from liftkit.conversion.tied import TiedRun
from liftkit.errors import ProofError
from liftkit.lift import Lift
from liftkit.models.spec import Architecture, Config
from liftkit.models.surgery import lifted_tensors

Read = Callable[[str], Tensor | None]
EXACT_TOLERANCE = 1e-3
# Each stored number is off by half a unit in the last place at most; over a few steps of a network that grows to
# some tens of units. More than this is a fault, not rounding.
STORED_TOLERANCE = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}


@dataclass
class Proof:
    """What the proof found; deviations are relative to the largest value of the run they compare with.

    Args:
        exact: largest deviation with projections in full precision, over all steps and the final sample.
        stored: the same with the projections as stored.
        steps: Euler steps.
        tokens: the grid, rows and columns.
        dtype: of the stored projections.
        kind: whether it ran on the assembled ``model`` or on the ``projections`` alone.
    """

    exact: float
    stored: float
    steps: int
    tokens: tuple[int, int]
    dtype: str
    kind: str = "model"

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def problems(self, lift: Lift) -> list[str]:
        """The deviations beyond their tolerance, a line each; none if the proof holds."""
        exactly = exact_tolerance(lift)
        rounded = max(STORED_TOLERANCE.get(getattr(torch, self.dtype), EXACT_TOLERANCE), exactly)
        return [
            f"the pixel model {what} deviates from its source by {value:.2e} of the range, allowed {allowed:.0e}"
            for value, allowed, what in (
                (self.exact, exactly, "in full precision"),
                (self.stored, rounded, f"as stored in {self.dtype}"),
            )
            if not value <= allowed
        ]

    def checked(self, lift: Lift) -> Proof:
        """This proof.

        Raises:
            ProofError: if it does not hold.
        """
        for problem in self.problems(lift):
            raise ProofError(f"the proof failed: {problem}; the output was discarded")
        return self


def worst(proofs: Sequence[Proof]) -> Proof:
    """The proof of several transformers with one lift: the largest deviations of any."""
    exact, stored = (max(getattr(each, name) for each in proofs) for name in ("exact", "stored"))
    return replace(proofs[0], exact=exact, stored=stored)


@dataclass(frozen=True)
class Pair:
    """A latent transformer and its pixel twin, by the tensors that they store.

    Args:
        spec: the architecture.
        lift: between the two.
        config: of the latent transformer.
        original: the source's tensor of a name, or None where there is none.
        stored: the twin's.
        steps: of Euler's method in a run.
        seed: of noise and conditioning.
    """

    spec: Architecture
    lift: Lift
    config: Config
    original: Read
    stored: Read
    steps: int = 8
    seed: int = 0

    def products(self, dtype: torch.dtype | Mapping[str, torch.dtype]) -> dict[str, Tensor]:
        """Source times lift; see :func:`liftkit.models.surgery.lifted_tensors`."""
        return lifted_tensors(self.spec, self.original, self.lift, dtype)

    def walk(
        self,
        kind: str,
        latent: Callable[[], Any],
        as_stored: Callable[[], Any],
        exact: Callable[[], Any],
        advance: Callable[[float], None],
        device: str = "cpu",
    ) -> Proof:
        """Run the latent model and two forms of its twin from tied noise.

        Args:
            kind: of what the flows are made.
            latent, as_stored, exact: give a flow each, one after another, so that one can go before the next is made.
            advance: called with the number of steps done.
            device: where the flows are.
        """
        run = TiedRun(self.spec, dict(self.config), self.lift, self.steps, self.seed, device)
        reference = run.sample_latent(latent())
        advance(self.steps)
        found = []
        for twin in (as_stored, exact):
            found.append(run.deviation(twin(), reference))
            advance(self.steps)
        weight = self.stored(f"{self.spec.outputs[0].path}.weight")
        assert weight is not None
        dtype = str(weight.dtype).removeprefix("torch.")
        return Proof(found[1], found[0], self.steps, self.spec.proof_grid, dtype, kind)


def exact_tolerance(lift: Lift) -> float:
    """What a deviation in full precision may be: rounding, and for an A that is itself rounded r max |A^T A - I|, which bounds
    the norm of what the theorem takes for zero."""
    error = lift.orthonormality()
    return EXACT_TOLERANCE if error < 1e-4 else max(EXACT_TOLERANCE, lift.rank * error)
