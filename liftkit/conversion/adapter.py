"""A conversion as an adapter: projections, output norm and lift, megabytes beside the gigabytes that they are for."""

from __future__ import annotations

from typing import Any

import torch

from liftkit.checkpoint.record import versions
from liftkit.checkpoint.source import check_unchanged
from liftkit.checkpoint.weights import read_known
from liftkit.conversion.card import adapter_card
from liftkit.conversion.plan import Plan
from liftkit.conversion.proof import Pair, Proof
from liftkit.conversion.standin import on_projections
from liftkit.lift import Lift
from liftkit.models.adapter import Adapter
from liftkit.models.surgery import BASIS, held_in_full, lifted_tensors
from liftkit.progress import Observer


def save_adapter(plan: Plan, lift: Lift, provenance: dict[str, Any], observer: Observer) -> Proof:
    """Write what a conversion changes, alone; see :class:`liftkit.models.adapter.Adapter`.

    Args:
        plan: of the conversion, with the folder to make.
        lift: to use.
        provenance: plain data that the record holds.
        observer: shows the progress.

    Returns:
        The proof, on the projections: there is nothing else that could differ from the source.

    Raises:
        ProofError: if the projections do not do what the source's do.
        LiftkitError: if the disk refuses, or the source changed.
    """
    spec, weights, options = plan.spec, plan.weights, plan.options
    dtype = None if options.dtype == "auto" else getattr(torch, options.dtype)
    tensors = {name: read_known(weights, name) for name in held_in_full(spec, weights.where)}
    if dtype is not None:
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    stored = {**tensors, **lifted_tensors(spec, weights.read, lift, dtype)}
    pair = Pair(spec, lift, plan.config, weights.read, stored.get, options.proof_steps, options.seed)
    proof = on_projections(pair, observer).checked(lift)
    check_unchanged(plan.sources)
    kept = {name: tensor for name, tensor in stored.items() if name != BASIS}
    record = {
        **provenance,
        "versions": versions(),
        "config": plan.model.numbers("transformer"),
        "proof": proof.to_dict(),
    }
    adapter = Adapter(kept, None, lift, spec.lifted_name, plan.model.name, record)
    adapter.save(plan.output, adapter_card(adapter, [plan.model.path]), overwrite=options.overwrite)
    return proof
