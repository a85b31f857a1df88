"""Adapters, ours and the authors', found, loaded upon a base, kept as ours, or fused into a model folder."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from liftkit.checkpoint.components import read_components
from liftkit.checkpoint.files import expanded, write_text
from liftkit.checkpoint.finite import check_files
from liftkit.checkpoint.folder import RECORD, atomic_folder, check_space
from liftkit.checkpoint.misplaced import is_hub_id, lora_advice, lora_folder, misplaced
from liftkit.checkpoint.model import ModelFolder, fetch, find_model, read_json
from liftkit.checkpoint.record import read_record, write_record
from liftkit.conversion.card import adapter_card
from liftkit.conversion.inputs import check_apart
from liftkit.errors import UsageError
from liftkit.formats.asymflow_adapter import is_asymflow_adapter, read_asymflow_adapter
from liftkit.formats.card import fused_card
from liftkit.formats.merging import tensor_shapes, write_merged
from liftkit.models.adapted import check_class, check_needs, load_pixel_pipeline
from liftkit.models.adapter import LIFT, Adapter, is_adapter
from liftkit.models.registry import architecture
from liftkit.options import ConvertOptions
from liftkit.progress import Observer, Silent

if TYPE_CHECKING:
    import torch

    from liftkit.conversion.proof import Proof


def open_adapter(source: str | Path) -> Adapter:
    """An adapter of ours or in the authors' format.

    Args:
        source: a folder, a file in the authors' format, or ``organization/name`` on the Hub, of which a folder or a file
            follows after another slash.

    Raises:
        UsageError: if it is neither.
    """
    folder = adapter_path(source)
    if folder.is_dir() and is_adapter(folder):
        return Adapter.load(folder)
    if is_asymflow_adapter(folder):
        return read_asymflow_adapter(folder)
    if lora_folder(folder):
        raise UsageError(f"{source}: no adapter of liftkit's: it holds a LoRA; {lora_advice(str(source))}")
    raise UsageError(
        f"{source}: no adapter: neither {RECORD} of liftkit's nor a .safetensors file with the tensors proj_buffer and "
        "scale_buffer of the AsymFlow authors; liftkit finetune with save: adapter makes one"
    )


def adapter_path(source: str | Path) -> Path:
    """The folder or the file of an adapter, fetched where it is on the Hub.

    Raises:
        UsageError: if there is none.
    """
    path = expanded(source)
    if path.is_dir() or is_asymflow_adapter(path):
        return path
    repository, inner = "/".join(str(source).split("/")[:2]), "/".join(str(source).split("/")[2:])
    if path.exists() or not is_hub_id(repository) or ".." in inner.split("/"):
        raise UsageError(f"{source}: no adapter folder: {misplaced(str(source))}")
    if inner.endswith(".safetensors"):
        return fetch(repository, [inner]) / inner
    start = f"{inner}/" if inner else ""
    return fetch(repository, [f"{start}*.{ending}" for ending in ("json", "safetensors", "md")]) / inner


def load_adapter(
    base: Any, adapter: str | Path | Adapter, device: str = "auto", dtype: torch.dtype | None = None
) -> Any:
    """A stock diffusers pipeline with an adapter applied: base + adapter in one call.

    Args:
        base: the latent model that the adapter came from or a conversion of it with the same lift: a folder, a Hub id,
            ``demo``, or a loaded pipeline, which is changed and stays where it is.
        adapter: a folder of ours or in the authors' format, a Hub id, or an :class:`Adapter` in memory.
        device: where a pipeline that is loaded here goes: ``auto``, ``cpu``, ``cuda``...
        dtype: of its weights; None takes float32 on the CPU and bfloat16 elsewhere.

    Returns:
        The pipeline: a pixel one where the adapter has a lift, else the latent one continued.

    Raises:
        UsageError: if either cannot be loaded, or they do not belong together.
    """
    learned = adapter if isinstance(adapter, Adapter) else open_adapter(adapter)
    if not isinstance(base, str | Path):
        return load_pixel_pipeline(base, learned)
    from liftkit.device import choose_device
    from liftkit.models.loaded import load_pipeline

    return load_pipeline(find_model(str(base)), choose_device(device)[0], dtype, learned).pipeline


@dataclass
class Fused:
    """A model folder with an adapter merged in.

    Args:
        output: the folder.
        adapter: what was merged.
        proof: of the conversion that came first; None where the base was converted already, or stays latent.
    """

    output: Path
    adapter: Adapter
    proof: Proof | None


def fuse(
    source: str | Path,
    base: str,
    output: Path,
    *,
    shards: Literal["copy", "link"] = "copy",
    overwrite: bool = False,
    observer: Observer | None = None,
) -> Fused:
    """A model folder of base and adapter: converted with the adapter's lift where the base is latent, then merged.

    Args:
        source: see :func:`open_adapter`.
        base: see :func:`liftkit.checkpoint.model.find_model`.
        output: the folder to make; it appears whole or not at all.
        shards: see :class:`liftkit.conversion.plan.ConvertOptions`.
        overwrite: replace an earlier folder of ours.
        observer: shows the progress.

    Raises:
        UsageError: if they do not belong together; nothing was written.
        ProofError: if the conversion does not do what its source does.
        LiftkitError: if the disk refuses.
    """
    observer, folder = observer or Silent(), find_model(str(base))
    check_apart(output, {"the adapter": source, "--base": folder.path})
    adapter, needs_lift = _fitting(open_adapter(source), folder)
    weights = [header.path.stat().st_size for header in folder.weights("transformer").headers.values()]
    with atomic_folder(output, overwrite=overwrite) as building:
        # The conversion lies beside the result for a moment.
        check_space(output, (1 + needs_lift) * sum(weights))
        start, proof = folder, None
        if not needs_lift:
            files = [
                header for part in read_components(folder) if part.weights for header in part.weights.headers.values()
            ]
            check_files(files, budget=math.inf)
        else:
            from liftkit.conversion.execute import convert

            assert adapter.lift is not None
            adapter.lift.save(building / LIFT)
            options = ConvertOptions(lift=building / LIFT, shards=shards, proof="projections", device="cpu")
            proof = convert(folder.source, building / "conversion", options, observer).proof
            start = find_model(str(building / "conversion"))
        record = _record(adapter, start)
        write_merged(adapter, start, building, observer, move=needs_lift)
        if needs_lift:
            shutil.rmtree(start.path)
        _write_scheduler(adapter, building)
        write_text(building / "README.md", fused_card(adapter, [adapter_path(source), folder.path]))
        write_record(building, record)
    return Fused(output, adapter, proof)


def _write_scheduler(adapter: Adapter, building: Path) -> None:
    """The scheduler by which an adapter's authors sample, where the adapter says so, in the place of the base's."""
    from liftkit.models.scheduler import authors_config

    sampling, lift = adapter.provenance.get("sampling"), adapter.lift
    if not isinstance(sampling, dict) or lift is None:
        return
    config = authors_config(sampling, lift.scale, lift.patch_size, lift.color)
    write_text(building / "scheduler" / "scheduler_config.json", json.dumps(config, indent=2) + "\n")
    index = {**read_json(building / "model_index.json"), "scheduler": ["diffusers", config["_class_name"]]}
    write_text(building / "model_index.json", json.dumps(index, indent=2) + "\n")


def keep(source: str | Path, base: str, output: Path, *, overwrite: bool = False) -> Adapter:
    """An adapter as a folder of ours, checked against the headers of its base.

    Raises:
        UsageError: if they do not belong together; nothing was written.
    """
    folder = find_model(str(base))
    check_apart(output, {"the adapter": source, "--base": folder.path})
    adapter, _ = _fitting(open_adapter(source), folder)
    adapter.save(output, adapter_card(adapter, [adapter_path(source), folder.path]), overwrite=overwrite)
    return adapter


def _fitting(adapter: Adapter, folder: ModelFolder) -> tuple[Adapter, bool]:
    """The adapter with the name of its base, and whether the base has to be lifted; checked by headers alone."""
    needs_lift = check_class(adapter, folder.class_of("transformer") or "no transformer")
    check_needs(adapter, folder)
    shapes = tensor_shapes(folder.weights("transformer"))
    if needs_lift:
        from liftkit.fit.subject import inspect_model
        from liftkit.models.surgery import check_lift

        assert adapter.lift is not None
        subject = inspect_model(folder.source)
        check_lift(subject.spec, subject.config, subject.factor, adapter.lift)
        shapes = _lifted_shapes(shapes, adapter)
    adapter.check(shapes)
    provenance = {**adapter.provenance, "config": folder.numbers("transformer")}
    return replace(adapter, base=base_name(folder), provenance=provenance), needs_lift


def _lifted_shapes(shapes: dict[str, tuple[int, ...]], adapter: Adapter) -> dict[str, tuple[int, ...]]:
    """Shapes of a latent transformer's tensors after its conversion."""
    from liftkit.models.surgery import BASIS, RawChannels

    lift, result = adapter.lift, dict(shapes)
    assert lift is not None
    spec = architecture(adapter.transformer)
    for projection, side in spec.projections:
        names = [f"{projection.path}.{kind}" for kind in (("weight",) if side == "input" else ("weight", "bias"))]
        for name in filter(shapes.__contains__, names):
            raw = RawChannels(spec, projection, side, lift.latent_patch)
            result[name] = raw.reshaped(shapes[name], lift.rank, lift.dim)
    # An adapter of a network that was trained in full holds the basis too.
    result[BASIS] = (lift.dim, lift.rank)
    return result


def base_name(folder: ModelFolder) -> str:
    """Name of the latent model that a folder is or came from."""
    record = read_record(folder.path)
    return str(record.get("source", {}).get("model", folder.name))


def _record(adapter: Adapter, start: ModelFolder) -> dict[str, Any]:
    """What the record of a merged folder says, but for its manifest."""
    record = read_record(start.path)
    # Sums of tensors in files that will no longer be there.
    record.pop("tensors", None)
    ranks = {"rank": max(len(down) for down, _ in adapter.pairs.values())} if adapter.pairs else {}
    return {"format": "liftkit.finetune", "version": 1, **record, "finetune": {**adapter.provenance, **ranks}}
