"""Models and adapters of ours as adapters, in our own format or in that of the paper's authors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from liftkit.checkpoint.files import expanded
from liftkit.checkpoint.model import ModelFolder, Weights, find_model
from liftkit.checkpoint.record import read_record
from liftkit.checkpoint.weights import read_known
from liftkit.conversion.card import adapter_card
from liftkit.conversion.inputs import check_apart
from liftkit.errors import UsageError
from liftkit.formats.adapters import base_name
from liftkit.formats.asymflow_adapter import write_asymflow_adapter
from liftkit.formats.asymflow_limits import check_exportable
from liftkit.formats.card import exported_card
from liftkit.formats.merging import tensor_shapes
from liftkit.lift import Lift
from liftkit.models.adapter import LIFT, LORA_A, LORA_B, WEIGHT, Adapter, is_adapter
from liftkit.models.registry import architecture, is_lifted
from liftkit.models.spec import Architecture
from liftkit.models.surgery import BASIS, held_in_full, lifted_tensors
from liftkit.progress import Observer, Silent

# Beyond the rank that is kept, for the accuracy of a randomized decomposition.
OVERSAMPLING, POWER_STEPS = 16, 4


@dataclass
class Exported:
    """What was exported.

    Args:
        output: the folder.
        adapter: its content.
        residual: of the LoRA that were taken from differences: the largest norm of what was left out, relative to the
            weight's own; None where nothing had to be taken so.
    """

    output: Path
    adapter: Adapter
    residual: float | None = None


def export_adapter(
    folder: str,
    output: Path,
    format_: str,
    *,
    base: str | None = None,
    rank: int | None = None,
    overwrite: bool = False,
    observer: Observer | None = None,
) -> Exported:
    """Export to an adapter folder, ours (:mod:`liftkit.models.adapter`) or the authors' (:mod:`liftkit.formats.asymflow_adapter`).

    Args:
        folder: an adapter folder of ours, or a converted folder, finetuned or not.
        output: the folder to make.
        format_: its format, one of :data:`FORMATS`.
        base: the model that it came from; for an adapter that lacks a projection or the output norm, and for a folder that
            was finetuned, of which the difference to its base is taken.
        rank: keep this rank of such differences whatever is lost; the rank of its recipe if not given, of which nothing
            but rounding may be left out.
        overwrite: replace an adapter that was exported there before.
        observer: shows the progress.

    Raises:
        UsageError: if the format cannot hold it, with the reason; nothing was written.
        LiftkitError: if the disk refuses.
    """
    if format_ not in FORMATS:
        raise UsageError(f"--format {format_}: unknown; choose {', '.join(FORMATS)}")
    check_apart(output, {"the folder": folder, "--base": base})
    residual, sources = None, [expanded(folder)]
    if is_adapter(folder):
        adapter = _complete(Adapter.load(folder), base)
        numbers = find_model(base).config("transformer") if base else adapter.provenance.get("config")
    else:
        found = find_model(str(folder))
        adapter, residual = _extract(found, base, rank, observer or Silent())
        sources = [found.path]
        numbers = found.config("transformer")
    FORMATS[format_](adapter, output, Origin(folder, sources, numbers), overwrite)
    return Exported(output, adapter, residual)


@dataclass(frozen=True)
class Origin:
    """Where an adapter that is written comes from.

    Args:
        name: of the folder, as it was given.
        sources: folders whose licenses and cards count.
        config: of the base's transformer; None where nothing says it.
    """

    name: str
    sources: list[Path]
    config: dict[str, Any] | None


def _write_own(adapter: Adapter, output: Path, origin: Origin, overwrite: bool) -> None:
    adapter.save(output, adapter_card(adapter, origin.sources), overwrite=overwrite)


def _write_authors(adapter: Adapter, output: Path, origin: Origin, overwrite: bool) -> None:
    check_exportable(adapter)
    if origin.config is None:
        raise UsageError(
            f"{origin.name}: it does not say how large its base is, which the authors' loader needs; give --base, the model that "
            "it is for"
        )
    write_asymflow_adapter(adapter, output, exported_card(adapter, origin.sources), origin.config, overwrite=overwrite)


Writer = Callable[[Adapter, Path, Origin, bool], None]
FORMATS: dict[str, Writer] = {"adapter": _write_own, "asymflow-adapter": _write_authors}
"""What writes an adapter, by the name of its format; the last argument says whether an earlier output is replaced. A writer
raises UsageError, before it writes, if its format cannot hold the adapter."""


def _complete(adapter: Adapter, base: str | None) -> Adapter:
    """With all that an adapter holds in full: what was not trained so is the base's own, with its LoRA merged in."""
    if base is None or adapter.lift is None:
        return adapter
    tensors = _pixel_tensors(find_model(str(base)), architecture(adapter.transformer), adapter.lift)
    modules = {name.removesuffix(WEIGHT) for name in tensors}
    wanted = {
        name: tensor
        for name, tensor in tensors.items()
        if name not in adapter.tensors or f"{name.removesuffix(WEIGHT)}{LORA_A}" in adapter.tensors
    }
    merged = {name: adapter.apply_to(name, tensor) for name, tensor in wanted.items()}
    taken = {f"{module}{half}" for module in modules for half in (LORA_A, LORA_B)}
    kept = {name: tensor for name, tensor in adapter.tensors.items() if name not in taken}
    return replace(adapter, tensors={**kept, **merged})


def _pixel_tensors(folder: ModelFolder, spec: Architecture, lift: Lift) -> dict[str, Tensor]:
    """Projections and output norm of a base, lifted where it is latent."""
    if folder.class_of("transformer") not in (spec.name, spec.lifted_name):
        raise UsageError(f"--base {folder.source}: its transformer is no {spec.name}; is it the right base?")
    weights = folder.weights("transformer")
    found = {name: read_known(weights, name) for name in held_in_full(spec, weights.where)}
    if not is_lifted(folder.class_of("transformer") or ""):
        found |= lifted_tensors(spec, weights.read, lift)
        del found[BASIS]
    return found


def _extract(
    folder: ModelFolder, base: str | None, rank: int | None, observer: Observer
) -> tuple[Adapter, float | None]:
    """A converted folder as an adapter: what the format holds in full, and LoRA for what else was finetuned."""
    name = folder.class_of("transformer") or "no transformer"
    if not is_lifted(name):
        raise UsageError(f"{folder.source}: its transformer is {name}; give a converted folder, or an adapter of ours")
    record: dict[str, Any] = read_record(folder.path)
    weights, lift = folder.weights("transformer"), Lift.load(folder.path / LIFT)
    tensors = {key: read_known(weights, key) for key in held_in_full(architecture(name), weights.where)}
    provenance: dict[str, Any] = {key: record[key] for key in ("versions", "finetune") if key in record}
    adapter = Adapter(tensors, None, lift, name, base_name(folder), provenance)
    if record.get("format") == "liftkit.conversion" and "finetune" not in record:
        # All else is the base's, bit for bit, as the record of its conversion says.
        return adapter, None
    if base is None:
        raise UsageError(
            f"{folder.source}: finetuned since its conversion; give --base, the model that it came from, to tell what changed"
        )
    pairs, residual = _differences(
        weights, find_model(str(base)), set(tensors), rank or _recipe_rank(record), rank is not None, observer
    )
    return replace(adapter, tensors={**tensors, **pairs}), residual


def _recipe_rank(record: dict[str, Any]) -> int | None:
    """The rank of the LoRA that a folder was finetuned with, or that was merged into it, if its record says so."""
    finetune = record.get("finetune") or {}
    trainable = (finetune.get("recipe") or {}).get("trainable") or {}
    found = finetune.get("rank", trainable.get("rank") if trainable.get("mode") == "lora" else None)
    return found if isinstance(found, int) and found > 0 else None


def _differences(
    weights: Weights, base: ModelFolder, full: set[str], rank: int | None, lossy: bool, observer: Observer
) -> tuple[dict[str, Tensor], float | None]:
    """LoRA pairs for everything that is not the base's nor held in full, and what they leave out."""
    there, apart = base.weights("transformer"), full | {BASIS}
    own, other = (
        {key: shape for key, shape in tensor_shapes(each).items() if key not in apart} for each in (weights, there)
    )
    if own != other:
        wrong = sorted(key for key in own.keys() | other.keys() if own.get(key) != other.get(key))
        raise UsageError(
            f"--base {base.source}: tensor {wrong[0]!r} is {other.get(wrong[0])} there, {own.get(wrong[0])} here; is it the "
            "right base?"
        )
    pairs: dict[str, Tensor] = {}
    residuals = []
    with observer.stage("export: differences to the base", len(own), "tensors") as advance:
        for name, mine, theirs in _changed(list(own), weights, there, advance):
            _check_fits(name, mine, rank)
            assert rank is not None
            down, up, residual = low_rank(mine, theirs, rank)
            if not lossy and not residual <= torch.finfo(mine.dtype).eps:
                raise UsageError(
                    f"tensor {name!r} changed by more than rank {rank}: without the rest, {residual:.1e} of it is lost; give "
                    "--rank N to export the best LoRA of that rank all the same"
                )
            module = name.removesuffix(WEIGHT)
            pairs |= {f"{module}{LORA_A}": down, f"{module}{LORA_B}": up}
            residuals.append(residual)
    return pairs, max(residuals, default=None)


def _changed(names: list[str], weights: Weights, there: Weights, advance: Any) -> Iterator[tuple[str, Tensor, Tensor]]:
    for name in names:
        mine, theirs = read_known(weights, name), read_known(there, name)
        # A conversion may have cast it.
        if not torch.equal(mine, theirs.to(mine.dtype)):
            yield name, mine, theirs
        advance(1)


def _check_fits(name: str, tensor: Tensor, rank: int | None) -> None:
    if tensor.ndim != 2 or not name.endswith(WEIGHT) or not tensor.is_floating_point():
        raise UsageError(
            f"tensor {name!r} was finetuned, and is no matrix that a LoRA could change: the model was trained in full, for "
            "which the format has no place; finetune with trainable.mode: lora"
        )
    if rank is None:
        raise UsageError(
            f"tensor {name!r} was finetuned, and no recipe says by which rank; give --rank N to export the best LoRA of that "
            "rank"
        )


def low_rank(mine: Tensor, theirs: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The LoRA pair that is nearest to a difference.

    Args:
        mine, theirs: (out, in).
        rank: of the pair.

    Returns:
        A (rank, in) and B (out, rank) in the dtype of ``mine``, and the norm of ``mine - theirs - B A`` relative to that of
        ``mine``.
    """
    change = mine.double() - theirs.double()
    rank = min(rank, *change.shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        count = min(rank + OVERSAMPLING, *change.shape)
        left, values, right = torch.svd_lowrank(change, q=count, niter=POWER_STEPS)
    root = values[:rank].sqrt()
    up, down = ((left[:, :rank] * root).to(mine.dtype), (root[:, None] * right[:, :rank].T).to(mine.dtype))
    rest = change - up.double() @ down.double()
    return down.contiguous(), up.contiguous(), (rest.norm() / mine.double().norm().clamp(min=1e-30)).item()
