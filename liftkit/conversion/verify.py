"""Theorem 1 on the spot: the pixel model's sample is the lifted sample of the latent model, at every step.

Start the pixel model at noise eps and the latent model at ``A^T eps``; walk noise grids related by
``tau = k(sigma) sigma``. Then ``A^T (k x_t) = z_tau`` after every Euler step, and ``x_0 = s A z_0`` at the end.
This holds for any network and whatever it is told, so that random conditioning proves as much as a prompt.

First the stored projections are compared with the products, bit for bit. Then two runs are made, both in float32. With
the projections computed in full precision the identity must hold to rounding, which proves the method, the geometry and
every unchanged tensor (rounded in the source too, where another dtype was asked for). With the projections as stored
(rounded once to the checkpoint's dtype) the deviation measures what that rounding costs.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from liftkit.asymflow import calibrate, lift_sigma
from liftkit.checkpoint.model import Weights, read_weights
from liftkit.checkpoint.rewrite import torch_dtype
from liftkit.conversion.surgery import lifted_tensors
from liftkit.errors import LiftkitError, ProofError
from liftkit.lift import Lift
from liftkit.models.flow import FlowModel, euler, open_flow
from liftkit.models.registry import lifted_class
from liftkit.models.spec import Architecture
from liftkit.progress import Observer, Silent
from liftkit.tokens import patchify, unpatchify

EXACT_TOLERANCE = 1e-3
# Each stored number is off by half a unit in the last place at most; over a few steps of a network that grows to
# some tens of units. More than this is a fault, not rounding.
STORED_TOLERANCE = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}
GRID = (4, 6)


@dataclass
class Proof:
    """What the proof found; deviations are relative to the largest value of the run they compare with.

    Args:
        exact: largest deviation with projections in full precision, over all steps and the final sample.
        stored: the same with the projections as stored.
        steps: Euler steps.
        tokens: the grid, rows and columns.
        dtype: of the stored projections.
    """

    exact: float
    stored: float
    steps: int
    tokens: tuple[int, int]
    dtype: str

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def prove(
    source: Path,
    converted: Path,
    spec: Architecture,
    lift: Lift,
    *,
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

    Raises:
        ProofError: if a stored projection is not the product, or a deviation is beyond its tolerance.
        LiftkitError: if the device's memory does not hold a model in float32.
    """
    observer = observer or Silent()
    weights = read_weights(source / "transformer")
    stored = read_weights(converted / "transformer")
    products = lifted_tensors(spec, weights.read, lift, torch.float64)
    check_stored(stored, products)
    try:
        with full_precision(), observer.stage("prove: sampling both models", 3 * steps, "steps") as advance:
            latent = _load(_stock(spec), source, device, weights.variant)
            round_as_stored(latent, stored, products)
            run = TiedRun(spec, dict(latent.config), lift, steps, seed, device)
            reference = run.sample_latent(open_flow(latent))
            advance(steps)
            del latent
            twin = _load(lifted_class(spec), converted, device, stored.variant)
            as_stored = run.deviation(open_flow(twin), reference)
            advance(steps)
            full = {name: product.float() for name, product in products.items()}
            twin.load_state_dict({**twin.state_dict(), **full}, strict=True)
            exact = run.deviation(open_flow(twin), reference)
            advance(steps)
    except torch.OutOfMemoryError as error:
        raise LiftkitError(
            f"--device {device}: not enough memory for the proof, which needs the transformer in float32; use --device cpu"
        ) from error
    dtype = stored_dtype(stored, f"{spec.outputs[0].path}.weight")
    proof = Proof(exact, as_stored, steps, GRID, str(dtype).removeprefix("torch."))
    _check_deviations(proof, STORED_TOLERANCE.get(dtype, EXACT_TOLERANCE))
    return proof


def check_stored(stored: Weights, products: dict[str, Tensor]) -> None:
    """Whether the stored projections are the products in float64, rounded once: bit for bit.

    Raises:
        ProofError: naming the tensor that is not.
    """
    for name, product in products.items():
        found = stored.read(name)
        if found is None or not torch.equal(found, product.to(found.dtype)):
            what = "is missing" if found is None else f"is not source times lift, rounded to {found.dtype}"
            raise ProofError(f"the proof failed: the stored tensor {name!r} {what}; the output was discarded")


def stored_dtype(stored: Weights, name: str) -> torch.dtype:
    """The dtype in which a tensor is stored."""
    return torch_dtype(stored.headers[stored.where[name]].tensors[name].dtype)


@torch.no_grad()
def round_as_stored(latent: Any, stored: Weights, products: Container[str]) -> None:
    """Round what a conversion only copies to the dtype in which it was stored: what ``--dtype`` costs is no fault."""
    for name, tensor in latent.state_dict().items():
        if name in stored.where and name not in products:
            tensor.copy_(tensor.to(stored_dtype(stored, name)))


def _check_deviations(proof: Proof, stored_tolerance: float) -> None:
    for value, allowed, what in (
        (proof.exact, EXACT_TOLERANCE, "in full precision"),
        (proof.stored, stored_tolerance, f"as stored in {proof.dtype}"),
    ):
        if not value <= allowed:
            raise ProofError(
                f"the proof failed: the pixel model {what} deviates from its source by {value:.2e} of the range, "
                f"allowed {allowed:.0e}; the output was discarded"
            )


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


class TiedRun:
    """Tied noise, tied grids and shared conditioning for a latent model and its pixel twin.

    Args:
        spec: the architecture.
        config: of the latent transformer.
        lift: between the two.
        steps: of Euler's method.
        seed: of noise and conditioning.
        device: where the models are.
        dtype: of the states.
    """

    def __init__(
        self,
        spec: Architecture,
        config: dict[str, Any],
        lift: Lift,
        steps: int,
        seed: int,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.lift, self.patch = lift, spec.latent_patch(config)
        generator = torch.Generator().manual_seed(seed)
        rows, columns = GRID
        noise = torch.randn(1, 3, rows * lift.patch_size, columns * lift.patch_size, generator=generator)
        conditioning = spec.conditioning(config, 1, generator)
        self.noise = noise.to(device, dtype)
        self.conditioning = {key: value.to(device) for key, value in conditioning.items()}
        self.basis = lift.basis.to(device, dtype)
        self.taus = torch.linspace(1.0, 0.0, steps + 1, device=device, dtype=dtype)

    def sample_latent(self, flow: FlowModel) -> list[Tensor]:
        """Latent tokens z_tau after every step, starting at A^T eps."""
        start = patchify(self.noise, self.lift.patch_size) @ self.basis
        rows, columns = GRID
        trace: list[Tensor] = []
        state = unpatchify(start, self.patch, rows * self.patch, columns * self.patch)
        euler(flow, state, self.taus, self.conditioning, trace)
        return [patchify(state, self.patch) for state in trace]

    def deviation(self, flow: FlowModel, reference: list[Tensor]) -> float:
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


def _stock(spec: Architecture) -> Any:
    import diffusers

    return getattr(diffusers, spec.name)


def _load(model: Any, folder: Path, device: str, variant: str | None) -> Any:
    loaded = model.from_pretrained(folder, subfolder="transformer", dtype=torch.float32, variant=variant)
    return loaded.to(device).eval()
