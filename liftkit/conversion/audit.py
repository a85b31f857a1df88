"""``liftkit verify``: whether a converted folder is what its conversion left, and does what its source does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from liftkit.checkpoint.components import LATENT_VAE
from liftkit.checkpoint.files import expanded
from liftkit.checkpoint.folder import RECORD
from liftkit.checkpoint.header import read_header
from liftkit.checkpoint.misplaced import misplaced
from liftkit.checkpoint.model import Weights, find_model, read_json, read_weights
from liftkit.checkpoint.record import BEGUN, read_record
from liftkit.checkpoint.rewrite import read_tensor
from liftkit.conversion.manifest import compared, own_files
from liftkit.conversion.proof import Pair, Proof, worst
from liftkit.conversion.standin import on_projections
from liftkit.conversion.verify import check_copied, mismatch
from liftkit.conversion.write import reference_file
from liftkit.errors import LiftkitError, UsageError
from liftkit.lift import Lift, orthonormal_to, orthonormality
from liftkit.models.absent import limits
from liftkit.models.builder import cannot_load
from liftkit.models.registry import architecture, is_lifted, lifted_class
from liftkit.models.spec import Architecture
from liftkit.models.surgery import BASIS, check_lift, free_basis, lifted_names
from liftkit.progress import Observer, Silent

# Another machine adds the terms of a product in another order.
SLACK, STEPS = 2.0**-44, 8


@dataclass
class Check:
    """One thing that was looked at.

    Args:
        name: what.
        detail: what was found, on one line.
        problems: what is wrong, each on one line; none if all is well.
    """

    name: str
    detail: str = ""
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether all is well."""
        return not self.problems


@dataclass
class Audit:
    """All that was looked at in a folder."""

    folder: Path
    checks: list[Check]

    @property
    def ok(self) -> bool:
        """Whether all is well."""
        return all(check.ok for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        checks = [{**asdict(check), "ok": check.ok} for check in self.checks]
        return {"folder": str(self.folder), "ok": self.ok, "checks": checks}


def audit(folder: str | Path, source: str | None = None, observer: Observer | None = None) -> Audit:
    """Look at a converted folder: manifest, bytes, headers and shapes, orthonormality, and the lift.

    Args:
        folder: what ``liftkit convert`` made.
        source: the model that it was made from, to compare unchanged tensors with byte for byte; a folder or a Hub id.
        observer: shows the progress.

    Raises:
        UsageError: if there is no such folder, or none that liftkit made.
    """
    path = expanded(folder)
    if not path.is_dir():
        raise UsageError(f"{folder}: {misplaced(str(folder))}; verify looks at what liftkit convert made")
    if not (path / RECORD).is_file():
        raise UsageError(f"{folder}: {RECORD} is missing; give a folder that liftkit convert made")
    return Audit(path, list(_Auditor(path, source, observer or Silent()).checks()))


class _Auditor:
    def __init__(self, folder: Path, source: str | None, observer: Observer) -> None:
        self.folder, self.source, self.observer = folder, source, observer
        self.record: dict[str, Any] = {}

    def checks(self) -> Iterator[Check]:
        """One after another; what one needs of another it reads again, so that each stands alone."""
        steps: list[tuple[str, Callable[[Check], None]]] = [
            ("manifest", self._manifest),
            ("weights", self._weights),
            ("components", self._components),
            ("basis", self._basis),
            ("lift", self._lift),
        ]
        if self.source is not None:
            steps.append(("source", self._source))
        for name, step in steps:
            check = Check(name)
            try:
                step(check)
            except LiftkitError as error:
                check.problems.append(str(error))
            except OSError as error:
                check.problems.append(f"{error.filename or self.folder}: {error.strerror or error}")
            yield check

    def _manifest(self, check: Check) -> None:
        """Missing, added and changed files; of changed weights the tensors."""
        self.record = read_record(self.folder)
        check.detail, check.problems = compared(self.folder, self.record, self.observer)

    def _weights(self, check: Check) -> None:
        """Headers of all weight files; names and shapes of the transformer against its class."""
        count = 0
        for path in own_files(self.folder):
            if path.suffix == ".safetensors":
                try:
                    count += len(read_header(path).tensors)
                except UsageError as error:
                    check.problems.append(str(error))
        theirs = 0
        for component in self._transformers():
            spec, config, stored = self._transformer(component)
            expected = _shapes(spec, config)
            found = {name: stored.headers[shard].tensors[name].shape for name, shard in stored.where.items()}
            for name in sorted(expected.keys() | found.keys()):
                if expected.get(name) != found.get(name):
                    text = f"found {_list(found.get(name))}, {spec.lifted_name} has {_list(expected.get(name))}"
                    check.problems.append(f"{component}: tensor {name!r}: {text}")
            theirs += len(found)
        check.detail = f"{count} tensors, {theirs} of them the {spec.lifted_name}'s, of its names and shapes"

    def _components(self, check: Check) -> None:
        """Raise unless the whole pipeline and the VAE of its source would load: everything is built, no weight is read."""
        model = find_model(str(self.folder))
        missing = cannot_load(model)
        names = [*model.components, *([LATENT_VAE] if (self.folder / LATENT_VAE).is_dir() else [])]
        check.detail = "; ".join([f"{', '.join(names)} load", *limits(model), *missing])

    def _basis(self, check: Check) -> None:
        """max |A^T A - I| in float64, of the lift and of what the transformer holds; the two are one."""
        lift = Lift.load(self.folder / "lift.safetensors")
        check.detail = f"max |A^T A - I| = {lift.orthonormality():.1e} in the lift"
        for component in self._transformers():
            basis = self._transformer(component)[2].read(BASIS)
            if basis is None:
                raise UsageError(f"{component}: tensor {BASIS!r} is missing")
            error = orthonormality(basis)
            check.detail += f", {error:.1e} in the {component}"
            allowed = orthonormal_to(basis)
            if not error < allowed:
                check.problems.append(f"{component}: {BASIS} is not orthonormal: {error:.1e}, allowed {allowed:.0e}")

    @property
    def _from_nothing(self) -> bool:
        return self.record.get("format") == BEGUN

    def _lift(self, check: Check) -> None:
        """Stored projections against source times lift, and what they do in a run; numbers of configs."""
        lift = Lift.load(self.folder / "lift.safetensors")
        scheduler = read_json(self.folder / "scheduler" / "scheduler_config.json")
        scales = {"scheduler": scheduler.get("lift_scale")}
        for component in self._transformers():
            spec, config, _ = self._transformer(component)
            if not self._from_nothing:
                check_lift(spec, config, lift.fold, lift)
            scales[component] = config["lift_scale"]
        for where, value in scales.items():
            if value != lift.scale:
                check.problems.append(f"{where}: its config has the scale {value}, the lift {lift.scale}")
        if self._from_nothing:
            check.detail = (
                f"made from nothing: rank {lift.rank} of {lift.dim}, and no source that it could be compared with"
            )
            for component in self._transformers():
                spec, config, stored = self._transformer(component)
                basis, wanted = stored.read(BASIS), free_basis(lift, spec, config)
                if basis is None or not torch.equal(basis, wanted.to(basis.dtype)):
                    check.problems.append(f"{component}: {BASIS} is not that of lift.safetensors")
            return
        if "finetune" in self.record:
            check.detail = "finetuned since its conversion: projections are no longer source times lift"
            return
        found = [self._projections(check, component, lift) for component in self._transformers()]
        proofs = [proof for _, proof in found if proof is not None]
        if not check.problems:
            proof = worst(proofs)
            check.detail = (
                f"{sum(count for count, _ in found)} tensors are source times lift, rounded once; deviation over {STEPS} steps "
                f"{proof.exact:.1e} in full precision, {proof.stored:.1e} as stored"
            )

    def _projections(self, check: Check, component: str, lift: Lift) -> tuple[int, Proof | None]:
        """One transformer's stored projections against source times lift: how many, and the proof on them."""
        spec, config, stored = self._transformer(component)
        kept = reference_file(component)
        header = read_header(self.folder / kept)

        def original(name: str) -> Tensor | None:
            return read_tensor(header, name) if name in header.tensors else None

        pair = Pair(spec, lift, config, original, stored.read, STEPS)
        products = pair.products(torch.float64)
        check.problems += filter(None, (mismatch(stored, name, value, SLACK) for name, value in products.items()))
        for name in sorted(header.tensors.keys() - products.keys()):
            reference, found = original(name), stored.read(name)
            if found is None or reference is None or not torch.equal(found, reference.to(found.dtype)):
                check.problems.append(f"{component}: tensor {name!r} is not the source's ({kept.as_posix()})")
        if check.problems:
            return len(products), None
        proof = on_projections(pair)
        check.problems += [f"{component}: {problem}" for problem in proof.problems(lift)]
        return len(products), proof

    def _source(self, check: Check) -> None:
        """Unchanged tensors against the source's, byte for byte."""
        assert self.source is not None
        model, count = find_model(self.source), 0
        for component in self._transformers():
            spec, _, stored = self._transformer(component)
            source = model.weights(component)
            changed = lifted_names(spec)
            check_copied(source, stored, changed)
            count += len(source.where.keys() - changed)
        check.detail = f"{count} tensors are the source's, byte for byte"

    def _transformers(self) -> list[str]:
        """The components that were lifted."""
        return ["transformer", *self._transformer()[0].companions]

    def _transformer(self, component: str = "transformer") -> tuple[Architecture, dict[str, Any], Weights]:
        file = self.folder / component / "config.json"
        config = read_json(file)
        name = config.get("_class_name")
        if not isinstance(name, str) or not is_lifted(name):
            raise UsageError(f"{file}: {name} is no pixel model of liftkit's")
        wrong = [key for key in ("lift_rank", "lift_dim", "lift_scale") if not isinstance(config.get(key), int | float)]
        if wrong:
            raise UsageError(f"{file}: {wrong[0]} is missing or no number")
        return architecture(name), config, read_weights(self.folder / component)


def _shapes(spec: Architecture, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """What the Asym class holds by its config, without memory."""
    from accelerate import init_empty_weights

    try:
        with init_empty_weights(include_buffers=False):
            twin = lifted_class(spec).from_config(config)
    except (KeyError, TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
        raise UsageError(f"transformer/config.json: {spec.lifted_name} cannot be made from it ({error})") from error
    return {name: tuple(tensor.shape) for name, tensor in twin.state_dict().items()}


def _list(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else str(list(shape))
