"""The converted folder, component by component; only the projections are computed, all else is copied."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from torch import Tensor

from liftkit.checkpoint.files import read_safetensors, write_safetensors, write_text
from liftkit.checkpoint.folder import link_or_copy
from liftkit.checkpoint.model import STEM
from liftkit.checkpoint.rewrite import read_tensor, rewrite_file
from liftkit.conversion.card import pipeline_file
from liftkit.conversion.plan import Plan
from liftkit.conversion.surgery import BASIS, lifted_config, lifted_tensors
from liftkit.lift import Lift
from liftkit.models.autoencoder import PixelAutoencoder
from liftkit.progress import Observer


def write_components(plan: Plan, lift: Lift, building: Path) -> None:
    """Everything but the transformer: index, pixel autoencoder, scheduler, and the source's other components."""
    source = plan.model
    for path in sorted(source.path.iterdir()):
        if path.is_dir() and path.name in source.index and path.name not in ("transformer", "vae", "scheduler"):
            link_or_copy(path, building / path.name)
    (building / "latent").mkdir()
    link_or_copy(source.path / "vae", building / "latent" / "vae")
    size = source.config("vae").get("sample_size", 1024)
    autoencoder = PixelAutoencoder.from_lift(lift, sample_size=size[0] if isinstance(size, list) else size)
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
    originals = {name: read_tensor(plan.weights.headers[shard], name) for name, shard in _reference(plan).items()}
    changed = lifted_tensors(plan.spec, originals.get, lift)
    dtype = None if plan.options.dtype == "auto" else getattr(torch, plan.options.dtype)
    if dtype is not None:
        # Cast from the float64 product, not from a rounded one.
        wide = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in originals.items()}
        changed = {
            k: v.to(torch.float32 if k == BASIS else dtype)
            for k, v in lifted_tensors(plan.spec, wide.get, lift).items()
        }
    home = plan.weights.where[f"{plan.spec.inputs[0].path}.weight"]
    where = {**plan.weights.where, BASIS: home}
    with observer.stage("write: transformer", plan.transformer_bytes, "bytes") as advance:
        for name, header in plan.weights.headers.items():
            here = {key: tensor for key, tensor in changed.items() if where[key] == name}
            rewrite_file(header, target / _plain(name), here, dtype=dtype, progress=advance)
    if plan.weights.sharded:
        size = sum(path.stat().st_size for path in target.glob("*.safetensors"))
        index = {"metadata": {"total_size": size}, "weight_map": {key: _plain(shard) for key, shard in where.items()}}
        write_text(target / f"{STEM}.safetensors.index.json", json.dumps(index, indent=2, sort_keys=True) + "\n")
    config = lifted_config(plan.spec, plan.config, lift)
    write_text(target / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    write_safetensors(building / "latent" / "reference.safetensors", originals, {"format": "pt"})


def reference_tensors(folder: Path) -> dict[str, Tensor]:
    """The source's projections and output norm, as a converted folder keeps them."""
    return read_safetensors(folder / "latent" / "reference.safetensors")[0]


def _reference(plan: Plan) -> dict[str, str]:
    """The tensors of the projections and of the modules that finetuning trains in full, and their shards."""
    paths = [projection.path for projection, _ in plan.spec.projections] + list(plan.spec.reference)
    return {name: shard for name, shard in plan.weights.where.items() if any(name.startswith(f"{p}.") for p in paths)}


def _plain(name: str) -> str:
    """A shard's file name without a variant: ``model.fp16-00001-of-2.safetensors`` holds no fp16 file's sibling."""
    stem, rest = name[: len(STEM)], name[len(STEM) :]
    numbered = rest.find("-")
    return stem + (rest[numbered:] if numbered >= 0 else ".safetensors")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
