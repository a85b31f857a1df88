"""The converted folder, component by component; only the projections are computed, all else is copied."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import torch

from liftkit.checkpoint.files import write_safetensors, write_text
from liftkit.checkpoint.folder import copy_tree
from liftkit.checkpoint.header import read_header
from liftkit.checkpoint.model import STEM, Weights
from liftkit.checkpoint.rewrite import rewrite_file
from liftkit.conversion.card import pipeline_file
from liftkit.conversion.plan import Plan
from liftkit.conversion.surgery import BASIS, lifted_config, lifted_tensors
from liftkit.lift import Lift
from liftkit.models.autoencoder import PixelAutoencoder
from liftkit.progress import Observer


def write_components(plan: Plan, lift: Lift, building: Path) -> None:
    """Everything but the transformer: index, pixel autoencoder, scheduler, and the source's other parts and licence."""
    source = plan.model
    for path in sorted(source.path.iterdir()):
        part = path.is_dir() and path.name in source.index and path.name not in ("transformer", "vae", "scheduler")
        if part or (path.is_file() and path.name.startswith("LICENSE")):
            copy_tree(path, building / path.name)
    (building / "latent").mkdir()
    copy_tree(source.path / "vae", building / "latent" / "vae")
    autoencoder = PixelAutoencoder.from_lift(lift, sample_size=source.image_size())
    autoencoder.save_pretrained(building / "vae")
    (building / "vae" / f"{STEM}.safetensors").chmod(0o666 & ~_umask())
    scheduler = {**source.config("scheduler"), "lift_scale": lift.scale}
    scheduler["_class_name"] = f"Asym{source.class_of('scheduler')}"
    (building / "scheduler").mkdir()
    write_text(building / "scheduler" / "scheduler_config.json", json.dumps(scheduler, indent=2) + "\n")
    index = {
        **source.index,
        "transformer": ["diffusers", plan.spec.lifted_name],
        "vae": ["diffusers", "PixelAutoencoder"],
        "scheduler": ["diffusers", scheduler["_class_name"]],
    }
    write_text(building / "model_index.json", json.dumps(index, indent=2) + "\n")
    write_text(building / "pipeline.py", pipeline_file(str(source.index["_class_name"])))
    lift.save(building / "lift.safetensors")


def write_transformer(plan: Plan, lift: Lift, building: Path, observer: Observer) -> None:
    """Stream the transformer's files into the new folder; only the projections are computed.

    What finetuning needs of the source, its projections and output norm, goes to ``latent/reference.safetensors``.
    """
    target = building / "transformer"
    target.mkdir()
    originals = {name: tensor for name in _reference(plan) if (tensor := plan.weights.read(name)) is not None}
    dtype = None if plan.options.dtype == "auto" else getattr(torch, plan.options.dtype)
    changed = lifted_tensors(plan.spec, originals.get, lift, dtype)
    home = plan.weights.where[f"{plan.spec.inputs[0].path}.weight"]
    where = {**plan.weights.where, BASIS: home}
    names = plain_names(plan.weights)
    with observer.stage("write: transformer", plan.transformer_bytes, "bytes") as advance:
        for name, header in plan.weights.headers.items():
            here = {key: tensor for key, tensor in changed.items() if where[key] == name}
            rewrite_file(header, target / names[name], here, dtype=dtype, progress=advance)
    if plan.weights.sharded:
        written = [entry for name in names.values() for entry in read_header(target / name).tensors.values()]
        index = {
            "metadata": {"total_size": sum(entry.size for entry in written)},
            "weight_map": {key: names[shard] for key, shard in where.items()},
        }
        write_text(target / f"{STEM}.safetensors.index.json", json.dumps(index, indent=2, sort_keys=True) + "\n")
    config = lifted_config(plan.spec, plan.config, lift)
    write_text(target / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    write_safetensors(building / "latent" / "reference.safetensors", originals, {"format": "pt"})


def plain_names(weights: Weights) -> dict[str, str]:
    """New names of weight files, by their old ones: without the variant of ``stem.fp16-00001-of-2.safetensors``, for
    which nobody will ask; as they are where two would get the same name."""
    if weights.variant is None:
        return {name: name for name in weights.headers}
    tag = re.compile(rf"^({STEM})\.{re.escape(weights.variant)}(?=(-\d+-of-\d+)?\.safetensors$)")
    names = {name: tag.sub(r"\1", name) for name in weights.headers}
    return names if len(set(names.values())) == len(names) else {name: name for name in names}


def _reference(plan: Plan) -> list[str]:
    """The tensors of the projections and of the modules that finetuning trains in full."""
    paths = [projection.path for projection, _ in plan.spec.projections] + list(plan.spec.reference)
    return [name for name in plan.weights.where if any(name.startswith(f"{path}.") for path in paths)]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
