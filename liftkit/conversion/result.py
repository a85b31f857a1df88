"""What a conversion leaves in memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from liftkit.conversion.plan import Plan
from liftkit.conversion.proof import Proof
from liftkit.lift import Lift
from liftkit.tally import Tally


@dataclass
class Conversion:
    """A finished conversion.

    Args:
        plan: what was done.
        lift: what was used, with its figures and pictures.
        proof: that the output does what its source does.
        tallies: accounts of the images of the fit.
    """

    plan: Plan
    lift: Lift
    proof: Proof
    tallies: list[Tally] = field(default_factory=list)

    @property
    def output(self) -> Path:
        """The converted folder."""
        return self.plan.output

    def __repr__(self) -> str:
        exact, stored = f"{self.proof.exact:.1e}", f"{self.proof.stored:.1e}"
        return (
            f"Conversion({str(self.output)!r}: rank {self.lift.rank} of {self.lift.dim}, scale {self.lift.scale:.4f}, "
            f"deviation {exact} in full precision, {stored} as stored)"
        )
