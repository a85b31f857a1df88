"""The converted folder, component by component; only the projections are computed, all else is copied.

Nothing here builds a model: the transformer's headers are read, its bytes go from file to file in the kernel.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from liftkit.checkpoint.copying import copy_file, extract_file, link_file
from liftkit.checkpoint.files import write_safetensors, write_text
from liftkit.checkpoint.follow import Ledger
from liftkit.checkpoint.header import Header, read_header
from liftkit.checkpoint.model import STEM
from liftkit.checkpoint.rewrite import casts, dtype_name, rewrite_file
from liftkit.checkpoint.source import Stamp
from liftkit.conversion.card import pipeline_file
from liftkit.conversion.plan import Plan
from liftkit.lift import Lift
from liftkit.models.surgery import BASIS, lifted_config, lifted_tensors
from liftkit.progress import Observer


@dataclass
class FileCopier:
    """Copies files that do not change.

    Args:
        stamps: what they looked like when the plan was made; another file is not taken in their place.
        link: give weight files a second name instead of copying them, where the file system allows.
        ledger: takes digests beside the writing.
        note: called with a sentence where linking was not possible.
    """

    stamps: Mapping[Path, Stamp] = field(default_factory=dict)
    link: bool = False
    ledger: Ledger | None = None
    note: Callable[[str], object] = lambda text: None
    _noted: bool = field(default=False, init=False)

    def copy(
        self,
        source: Path,
        target: Path,
        header: Header | None = None,
        progress: Callable[[int], None] = lambda count: None,
    ) -> None:
        """Take one file along, as it is."""
        if header is None and source.suffix == ".safetensors":
            header = read_header(source)
        if self.link and header is not None:
            if link_file(source, target, header, self.ledger):
                progress(target.stat().st_size)
                return
            if not self._noted:
                self.note(f"--shards link: {source} cannot be linked from here (another disk, or no right to); copying")
            self._noted = True
        stamp = self.stamps.get(source)
        copy_file(source, target, stamp=stamp, header=header, progress=progress, ledger=self.ledger)


def write_components(plan: Plan, lift: Lift, building: Path, copier: FileCopier | None = None) -> None:
    """Everything but the transformer: index, pixel autoencoder, scheduler, and the source's other parts and license."""
    source, copier = plan.model, copier or FileCopier()
    for name, path in plan.copied_files.items():
        target = building / name
        target.parent.mkdir(parents=True, exist_ok=True)
        copier.copy(path, target)
    for name, text in plan.made.items():
        write_text(building / name, text)
    (building / "vae").mkdir()
    config, tensors = autoencoder_files(lift, source.image_size())
    write_text(building / "vae" / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    write_safetensors(building / "vae" / f"{STEM}.safetensors", tensors, {"format": "pt"})
    scheduler = {**source.config("scheduler"), "lift_scale": lift.scale}
    scheduler["_class_name"] = f"Asym{source.class_of('scheduler')}"
    (building / "scheduler").mkdir()
    write_text(building / "scheduler" / "scheduler_config.json", json.dumps(scheduler, indent=2) + "\n")
    index = {
        **source.index,
        **{each.component: ["diffusers", plan.spec.lifted_name] for each in plan.transformers},
        "vae": ["diffusers", "PixelAutoencoder"],
        "scheduler": ["diffusers", scheduler["_class_name"]],
    }
    write_text(building / "model_index.json", json.dumps(index, indent=2) + "\n")
    write_text(building / "pipeline.py", pipeline_file(str(source.index["_class_name"])))
    lift.save(building / "lift.safetensors")


def write_transformer(
    plan: Plan, lift: Lift, building: Path, observer: Observer, copier: FileCopier | None = None
) -> None:
    """Stream a transformer's files into the new folder; only the projections are computed.

    What finetuning and ``verify`` need of the source, its projections and output norm, goes to :func:`reference_file`.
    """
    target, copier = building / plan.component, copier or FileCopier()
    target.mkdir()
    reference = {name: plan.weights.headers[plan.weights.where[name]] for name in _reference(plan)}
    dtype = None if plan.options.dtype == "auto" else getattr(torch, plan.options.dtype)
    changed = lifted_tensors(plan.spec, plan.weights.read, lift, dtype)
    extract_file(reference, building / reference_file(plan.component))
    home = plan.weights.where[f"{plan.spec.inputs[0].path}.weight"]
    where = {**plan.weights.where, BASIS: home}
    names = plan.weights.plain_names()
    with observer.stage(f"write: {plan.component}", plan.transformer_bytes, "bytes") as advance:
        for name, header in plan.weights.headers.items():
            here = {key: tensor for key, tensor in changed.items() if where[key] == name}
            if here or casts(header, dtype and dtype_name(dtype)):
                rewrite_file(header, target / names[name], here, dtype=dtype, progress=advance, ledger=copier.ledger)
            else:
                copier.copy(header.path, target / names[name], header, advance)
    if plan.weights.sharded:
        written = [entry for name in names.values() for entry in read_header(target / name).tensors.values()]
        index = {
            "metadata": {"total_size": sum(entry.size for entry in written)},
            "weight_map": {key: names[shard] for key, shard in where.items()},
        }
        write_text(target / f"{STEM}.safetensors.index.json", json.dumps(index, indent=2, sort_keys=True) + "\n")
    config = lifted_config(plan.spec, plan.config, lift)
    write_text(target / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")


def reference_file(component: str) -> Path:
    """Where a conversion keeps the source's projections and output norm of a transformer, relative to its folder."""
    name = "reference" if component == "transformer" else f"reference.{component}"
    return Path("latent") / f"{name}.safetensors"


def autoencoder_files(lift: Lift, sample_size: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and weights of the :class:`PixelAutoencoder` of a lift, as diffusers would save them, without building it
    (diffusers alone takes more memory than a conversion)."""
    channels = 3 * lift.fold**2
    numbers = channels * lift.latent_patch**2
    config = {
        "_class_name": "PixelAutoencoder",
        "_diffusers_version": version("diffusers"),
        "batch_norm_eps": 0.0,
        "block_out_channels": [channels] * lift.fold.bit_length(),
        "color": lift.color.to_dict(),
        "fold": lift.fold,
        "latent_channels": channels,
        "latent_patch": lift.latent_patch,
        "sample_size": sample_size,
        "scaling_factor": 1.0,
        "shift_factor": 0.0,
    }
    tensors = {
        "bn.num_batches_tracked": torch.tensor(0),
        "bn.running_mean": torch.zeros(numbers),
        "bn.running_var": torch.ones(numbers),
    }
    return config, tensors


def _reference(plan: Plan) -> list[str]:
    """The tensors of the projections and of the modules that finetuning trains in full."""
    paths = [projection.path for projection, _ in plan.spec.projections] + list(plan.spec.reference)
    return [name for name in plan.weights.where if any(name.startswith(f"{path}.") for path in paths)]
