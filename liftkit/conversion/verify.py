"""Theorem 1 on the spot: the pixel model's sample is the lifted sample of the latent model, at every step.

Start the pixel model at noise eps and the latent model at ``A^T eps``; walk noise grids related by
``tau = k(sigma) sigma``. Then ``A^T (k x_t) = z_tau`` after every Euler step, and ``x_0 = s A z_0`` at the end.
This holds for any network and whatever its conditioning, so that random conditioning proves as much as a prompt.

First the stored projections are compared with the products, bit for bit. Then two runs are made. With the projections
computed in full precision the identity must hold to rounding, which proves the method, the geometry and every unchanged
tensor (rounded in the source too, where another dtype was asked for). With the projections as stored (rounded once to the
checkpoint's dtype) the deviation measures what that rounding costs.

The runs are of the assembled models, in float32, where memory allows. Where it does not, they are of the projections
alone, with a fixed function in the network's place (:mod:`liftkit.conversion.standin`), and every other tensor is the
source's, copied by the kernel or compared byte for byte: together that is the same theorem, for it holds for any function.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from liftkit.checkpoint.model import Weights, find_model, read_json, read_weights
from liftkit.checkpoint.rewrite import compare_files, torch_dtype
from liftkit.conversion.proof import Pair, Proof
from liftkit.conversion.standin import on_projections
from liftkit.errors import LiftkitError, ProofError
from liftkit.lift import Lift
from liftkit.models.flow import FlowModel, open_flow
from liftkit.models.load import load_component
from liftkit.models.spec import Architecture
from liftkit.models.surgery import lifted_names
from liftkit.options import ProofKind
from liftkit.progress import Observer, Silent


def prove(
    source: Path,
    converted: Path,
    spec: Architecture,
    lift: Lift,
    *,
    component: str = "transformer",
    kind: ProofKind = "model",
    compared: bool = False,
    device: str = "cpu",
    steps: int = 8,
    seed: int = 0,
    observer: Observer | None = None,
) -> Proof:
    """Prove a conversion that lies on disk.

    Args:
        source: the latent pipeline's folder.
        converted: the pixel pipeline's folder.
        spec: the architecture.
        lift: the lift that was used.
        component: the transformer, of a pipeline that has several.
        kind: on the ``model`` or on the ``projections``; ``auto`` tries the model first.
        compared: whether unchanged tensors are known to be the source's; else they are compared byte for byte.

    Raises:
        ProofError: if a stored projection is not the product, another tensor not the source's, or a deviation is
            beyond its tolerance.
        LiftkitError: if the device's memory does not hold a model in float32.
    """
    weights, stored = read_weights(source / component), read_weights(converted / component)
    observer = observer or Silent()
    pair = Pair(
        spec, lift, read_json(source / component / "config.json"), weights.read, stored.read, steps=steps, seed=seed
    )
    check_stored(stored, pair.products({name: stored_dtype(stored, name) for name in stored.where}))
    if kind != "projections":
        try:
            return _on_model(pair, stored, source, converted, component, device, observer).checked(lift)
        except (torch.OutOfMemoryError, MemoryError) as error:
            if kind == "model":
                raise LiftkitError(
                    f"--device {device}: not enough memory for the proof, which needs the transformer in float32; "
                    "try --proof projections, or use --device cpu"
                ) from error
        observer.note(f"the transformer does not fit into the memory of {device}; proving on the projections")
    if not compared:
        check_copied(weights, stored, lifted_names(spec))
    return on_projections(pair, observer).checked(lift)


def _on_model(
    pair: Pair, stored: Weights, source: Path, converted: Path, component: str, device: str, observer: Observer
) -> Proof:
    """What tied runs of the assembled models in float32 find, of which one is in memory at a time."""
    models = [_load(source, component, device)]
    round_as_stored(models[0], stored, lifted_names(pair.spec))
    pair = replace(pair, config=dict(models[0].config))

    def twin() -> FlowModel:
        models.append(_load(converted, component, device))
        return open_flow(models[0])

    def exact() -> FlowModel:
        models[0].load_state_dict({**models[0].state_dict(), **pair.products(torch.float32)}, strict=True)
        return open_flow(models[0])

    with full_precision(), observer.stage("prove: sampling both models", 3 * pair.steps, "steps") as advance:
        return pair.walk("model", lambda: open_flow(models.pop()), twin, exact, advance, device)


def check_stored(stored: Weights, products: Mapping[str, Tensor]) -> None:
    """Raise unless the stored projections are the products in float64, rounded once: bit for bit.

    Raises:
        ProofError: naming the tensor that is not.
    """
    for name, product in products.items():
        wrong = mismatch(stored, name, product)
        if wrong:
            raise ProofError(f"the proof failed: {wrong}; the output was discarded")


def mismatch(stored: Weights, name: str, product: Tensor, slack: float = 0.0) -> str:
    """What is wrong with a stored projection that should be a product in float64, rounded once; nothing, if it is.

    Args:
        product: in float64, or rounded already.
        slack: of the product's largest value, by which the product itself may be off: none where it was computed by the
            same machine, some units of float64 where by another.
    """
    found = stored.read(name)
    if found is None:
        return f"the stored tensor {name!r} is missing"
    if found.shape == product.shape:
        if torch.equal(found, product.to(found.dtype)):
            return ""
        off = slack * product.abs().max()
        low, high = (product - off).to(found.dtype), (product + off).to(found.dtype)
        if slack and bool(((found >= low) & (found <= high)).all()):
            return ""
    return f"the stored tensor {name!r} is not source times lift, rounded to {found.dtype}"


def check_copied(source: Weights, stored: Weights, changed: Container[str]) -> None:
    """Raise unless every tensor but the changed ones is the source's, cast where it is stored in another dtype.

    Raises:
        ProofError: naming the tensor that is not.
    """
    for header in source.headers.values():
        shards = {stored.where.get(name) for name in header.tensors}
        if len(shards) != 1 or None in shards:
            raise ProofError(f"{header.path}: its tensors are not together in one converted file ({shards})")
        compare_files(header, stored.headers[str(shards.pop())], changed)


def stored_dtype(stored: Weights, name: str) -> torch.dtype:
    """The dtype in which a tensor is stored."""
    return torch_dtype(stored.headers[stored.where[name]].tensors[name].dtype)


@torch.no_grad()
def round_as_stored(latent: Any, stored: Weights, products: Container[str]) -> None:
    """Round what a conversion only copies to the dtype in which it was stored: what ``--dtype`` costs is no fault."""
    for name, tensor in latent.state_dict().items():
        if name in stored.where and name not in products:
            tensor.copy_(tensor.to(stored_dtype(stored, name)))


@contextmanager
def full_precision() -> Iterator[None]:
    """Float32 products with all their bits on CUDA too: the ten of TF32 would be taken for a fault."""
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions


def _load(folder: Path, component: str, device: str) -> Any:
    return load_component(find_model(str(folder)), component, torch.float32).to(device)
