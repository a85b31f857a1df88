"""What a conversion leaves in memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from liftkit.conversion.plan import Plan
from liftkit.conversion.verify import Proof
from liftkit.lift import Lift


@dataclass
class Conversion:
    """A finished conversion.

    Args:
        plan: what was done.
        lift: what was used, with its figures and pictures.
        proof: that the output does what its source does.
        skipped: one line on images that could not be used, or empty.
    """

    plan: Plan
    lift: Lift
    proof: Proof
    skipped: str = ""

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
