"""The plan of a conversion: everything that can be known, checked and printed before anything is computed."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from liftkit.checkpoint.folder import check_space, check_target, tree_size
from liftkit.checkpoint.header import TensorEntry, tensor_bytes
from liftkit.checkpoint.model import Weights
from liftkit.checkpoint.rewrite import rewritten_size
from liftkit.conversion.subject import Subject, check_sources, choose, inspect_model
from liftkit.errors import UsageError
from liftkit.fit.engine import FitOptions
from liftkit.lift import Lift

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
REPORT_BYTES = 48_000_000


@dataclass
class ConvertOptions(FitOptions):
    """What a user can choose; the command line and :func:`liftkit.convert` share it.

    Beside the choices of a fit (:class:`liftkit.fit.engine.FitOptions`):

    Args:
        dtype: of the written transformer: ``auto`` keeps every tensor's own.
        overwrite: replace an existing output.
        lift: reuse a saved lift instead of fitting one.
        proof_steps: Euler steps of the proof.
    """

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    overwrite: bool = False
    lift: Path | None = None
    proof_steps: int = 8


@dataclass
class Plan(Subject):
    """What a conversion would do.

    Args:
        output: the target folder.
        weights: the transformer's files.
        options: as given, with every automatic choice made.
        rewritten: tensors that change, by name, as they will be.
        kept: number of tensors whose bytes are copied.
        transformer_bytes: of the new transformer.
        needed_bytes: disk that the whole output takes.
        lift: a given lift, checked.
    """

    output: Path
    weights: Weights
    options: ConvertOptions
    rewritten: dict[str, TensorEntry] = field(default_factory=dict)
    kept: int = 0
    transformer_bytes: int = 0
    needed_bytes: int = 0
    lift: Lift | None = None


def make_plan(model: str, output: Path, options: ConvertOptions) -> Plan:
    """Check everything that can be checked, and say what would happen.

    Raises:
        UsageError: if the model, the options, the lift, the target or the disk will not do.
    """
    check_target(output, overwrite=options.overwrite)
    subject = inspect_model(model)
    _check_apart(output, {"the model": subject.model.path, "--images": options.images, "--lift": options.lift})
    weights = subject.model.weights("transformer")
    if options.rank is not None:
        raise UsageError("--rank is for training from scratch; a conversion has the rank of its latents")
    chosen = choose(options, subject)
    plan = Plan(**vars(subject), output=output, weights=weights, options=chosen)
    if chosen.lift is not None:
        from liftkit.conversion.surgery import check_lift

        plan.lift = Lift.load(chosen.lift)
        check_lift(plan.spec, plan.config, plan.factor, plan.lift)
    else:
        check_sources(chosen)
    _plan_tensors(plan)
    # The source's VAE stays beside the new model, every other component comes along, the reference holds the
    # projections and the output norm again, and the report a few pictures.
    others = sum(tree_size(subject.model.path / name) for name in subject.model.components if name != "transformer")
    kept_apart = 2 * sum(entry.size for entry in plan.rewritten.values()) + _size_of(plan, plan.spec.reference)
    plan.needed_bytes = plan.transformer_bytes + others + kept_apart + REPORT_BYTES
    check_space(output, plan.needed_bytes)
    return plan


def _check_apart(output: Path, inputs: dict[str, Path | str | None]) -> None:
    """Whether the output is none of the inputs, and holds none: replacing it must not remove what it is made from."""
    target = output.resolve()
    for name, path in inputs.items():
        if path is None or path == "demo":
            continue
        source = Path(path).expanduser().resolve()
        if source == target or target in source.parents:
            raise UsageError(f"{output}: holds {name} ({path}); choose another output")


def _size_of(plan: Plan, modules: tuple[str, ...]) -> int:
    """Bytes of the source's tensors below some modules."""
    entries = (header.tensors.items() for header in plan.weights.headers.values())
    return sum(e.size for each in entries for name, e in each if name.startswith(tuple(f"{m}." for m in modules)))


def _plan_tensors(plan: Plan) -> None:
    """Which tensors change and what the new transformer weighs, from headers and config alone."""
    growth = plan.dim // plan.rank if plan.dim % plan.rank == 0 else plan.dim / plan.rank
    wanted = None if plan.options.dtype == "auto" else DTYPES[plan.options.dtype]
    for projection, side in plan.spec.projections:
        for kind in ("weight", "bias") if side == "output" else ("weight",):
            name = f"{projection.path}.{kind}"
            if name not in plan.weights.where:
                if kind == "weight":
                    raise UsageError(
                        f"{plan.model.path / 'transformer'}: tensor {name!r} is missing; is the model complete?"
                    )
                continue
            entry = plan.weights.headers[plan.weights.where[name]].tensors[name]
            axis = 1 if side == "input" else 0
            shape = tuple(round(n * growth) if i == axis else n for i, n in enumerate(entry.shape))
            dtype = wanted or entry.dtype
            plan.rewritten[name] = TensorEntry(dtype, shape, 0, tensor_bytes(dtype, shape))
    plan.rewritten["lift.basis"] = TensorEntry("F32", (plan.dim, plan.rank), 0, 4 * plan.dim * plan.rank)
    plan.kept = len(plan.weights.where) - (len(plan.rewritten) - 1)
    for header in plan.weights.headers.values():
        here = {
            name: entry for name, entry in plan.rewritten.items() if plan.weights.where.get(name) == header.path.name
        }
        plan.transformer_bytes += rewritten_size(header, here, wanted)
    plan.transformer_bytes += plan.rewritten["lift.basis"].size
