"""Whether memory allows the proof on the assembled model: what that needs, what there is, and the choice."""

from __future__ import annotations

from math import prod

from liftkit.checkpoint.model import Weights
from liftkit.checkpoint.rewrite import FLOATS
from liftkit.device import available_memory
from liftkit.options import ProofKind

# Beside the weights in float32: what loading holds for a moment, activations, and the libraries.
ROOM_FACTOR, ROOM_BYTES = 1.25, 1_000_000_000


def choose_proof(wanted: ProofKind, weights: Weights, device: str) -> tuple[ProofKind, str]:
    """How a conversion is proved, ``model`` or ``projections``, and why."""
    if wanted != "auto":
        return wanted, "as asked"
    needed, there = model_memory(weights), available_memory(device)
    kind: ProofKind = "model" if needed <= there else "projections"
    return kind, f"running the model takes {needed / 1e9:.1f} GB with its libraries, {there / 1e9:.1f} GB are free"


def model_memory(weights: Weights) -> int:
    """Bytes that the proof on the model takes: one transformer in float32 at a time."""
    entries = [entry for header in weights.headers.values() for entry in header.tensors.values()]
    numbers = sum(prod(entry.shape) for entry in entries if entry.dtype in FLOATS)
    return round(4 * numbers * ROOM_FACTOR) + ROOM_BYTES
