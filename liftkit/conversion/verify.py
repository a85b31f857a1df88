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

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from liftkit.checkpoint.model import Weights, find_model, read_json, read_weights
from liftkit.checkpoint.rewrite import compare_files, torch_dtype
from liftkit.conversion.standin import Read, deviations
from liftkit.conversion.tied import TiedRun
from liftkit.errors import LiftkitError, ProofError
from liftkit.lift import Lift
from liftkit.models.flow import open_flow
from liftkit.models.load import load_component
from liftkit.models.spec import Architecture, Config
from liftkit.models.surgery import lifted_tensors
from liftkit.options import ProofKind
from liftkit.progress import Observer, Silent

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
    dtypes = {name: stored_dtype(stored, name) for name in stored.where}
    changed = check_stored(stored, lifted_tensors(spec, weights.read, lift, dtypes))
    if kind != "projections":
        case = _Case(spec, lift, weights, stored, changed, component, device, steps, seed)
        try:
            with full_precision(), observer.stage("prove: sampling both models", 3 * steps, "steps") as advance:
                return _on_model(case, source, converted, advance).checked(lift)
        except (torch.OutOfMemoryError, MemoryError) as error:
            if kind == "model":
                raise LiftkitError(
                    f"--device {device}: not enough memory for the proof, which needs the transformer in float32; "
                    "try --proof projections, or use --device cpu"
                ) from error
        observer.note(f"the transformer does not fit into the memory of {device}; proving on the projections")
    if not compared:
        check_copied(weights, stored, changed)
    config = read_json(source / component / "config.json")
    with observer.stage("prove: the projections", 3 * steps, "steps") as advance:
        return on_projections(spec, lift, config, weights.read, stored.read, steps, seed, advance).checked(lift)


def on_projections(
    spec: Architecture,
    lift: Lift,
    config: Config,
    original: Read,
    stored: Read,
    steps: int,
    seed: int,
    advance: Callable[[float], None] = lambda amount: None,
) -> Proof:
    """What a tied run through the projections alone finds; arguments as :func:`liftkit.conversion.standin.deviations`."""
    found = deviations(spec, lift, config, original, stored, steps, seed, advance)
    return Proof(*found, steps, spec.proof_grid, projection_dtype(spec, stored), "projections")


def projection_dtype(spec: Architecture, stored: Read) -> str:
    """In which the projections are stored, such as ``bfloat16``."""
    weight = stored(f"{spec.outputs[0].path}.weight")
    assert weight is not None
    return str(weight.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class _Case:
    """What is to be proved on the assembled models."""

    spec: Architecture
    lift: Lift
    source: Weights
    stored: Weights
    changed: set[str]
    component: str
    device: str
    steps: int
    seed: int


def _on_model(case: _Case, source: Path, converted: Path, advance: Callable[[float], None]) -> Proof:
    """What a tied run of the assembled models in float32 finds, of which one is in memory at a time."""
    latent = _load(source, case.component, case.device)
    round_as_stored(latent, case.stored, case.changed)
    run = TiedRun(case.spec, dict(latent.config), case.lift, case.steps, case.seed, case.device)
    reference = run.sample_latent(open_flow(latent))
    advance(case.steps)
    del latent
    twin = _load(converted, case.component, case.device)
    as_stored = run.deviation(open_flow(twin), reference)
    advance(case.steps)
    full = lifted_tensors(case.spec, case.source.read, case.lift, torch.float32)
    twin.load_state_dict({**twin.state_dict(), **full}, strict=True)
    exact = run.deviation(open_flow(twin), reference)
    advance(case.steps)
    return Proof(
        exact, as_stored, case.steps, case.spec.proof_grid, projection_dtype(case.spec, case.stored.read), "model"
    )


def check_stored(stored: Weights, products: Mapping[str, Tensor]) -> set[str]:
    """Raise unless the stored projections are the products in float64, rounded once: bit for bit.

    Returns:
        The names of the products.

    Raises:
        ProofError: naming the tensor that is not.
    """
    for name, product in products.items():
        wrong = mismatch(stored, name, product)
        if wrong:
            raise ProofError(f"the proof failed: {wrong}; the output was discarded")
    return set(products)


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


def exact_tolerance(lift: Lift) -> float:
    """What a deviation in full precision may be: rounding, and for an A that is itself rounded r max |A^T A - I|, which bounds
    the norm of what the theorem takes for zero."""
    error = lift.orthonormality()
    return EXACT_TOLERANCE if error < 1e-4 else max(EXACT_TOLERANCE, lift.rank * error)


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
