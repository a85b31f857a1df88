"""Put the flow and TAEF2 together: ``liftkit/assets/tiny-flux2``, a pipeline folder in half precision."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from diffusers import Flux2Transformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file

from liftkit.checkpoint.model import find_model
from liftkit.embedded import TINY_FLUX2_PIXEL
from liftkit.finetune.result import card
from liftkit.models.adapter import Adapter
from liftkit.models.load import load_vae
from tools.tiny_flux2 import flow
from tools.tiny_flux2.taef2 import VAE
from tools.tiny_klein.assemble import write_pipeline

SHIFT = 2.0
"""Of the sampler's noise levels."""


def assemble(folder: Path = VAE.parent) -> None:
    """Write the pipeline folder; the VAE's files stay as they are.

    Raises:
        SystemExit: when the flow was not trained.
    """
    weights = flow.WORK / "flow.safetensors"
    if not weights.is_file():
        raise SystemExit(f"{weights} is missing: run python -m tools.tiny_flux2 flow first")
    transformer = Flux2Transformer2DModel(**flow.CONFIG)
    transformer.load_state_dict(load_file(weights))
    building = flow.WORK / "building"
    shutil.rmtree(building, ignore_errors=True)
    write_pipeline(building, load_vae(VAE), transformer, SHIFT)
    shutil.rmtree(building / "vae")
    shutil.copytree(VAE, building / "vae")
    for path in sorted(building.rglob("*")):
        if path.is_file():
            target = folder / path.relative_to(building)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    shutil.rmtree(building)
    print(f"assembled {folder}", flush=True)


def ship(source: Path, target: Path = TINY_FLUX2_PIXEL, onto: Path | None = None) -> None:
    """Write an attempt's result as ``liftkit/assets/tiny-flux2-pixel``, an adapter for tiny-flux2 by that name.

    Args:
        source: the attempt's adapter.
        target: to write.
        onto: the adapter that it went on from, for what it left as it was.

    Raises:
        SystemExit: if it went on from another attempt and lacks tensors that are in that one alone.
    """
    adapter, folder = Adapter.load(source), find_model("tiny-flux2")
    if onto is not None:
        adapter = replace(adapter, tensors={**Adapter.load(onto).tensors, **adapter.tensors})
    with safe_open(folder.path / "transformer" / "diffusion_pytorch_model.safetensors", "pt") as file:
        missing = set(file.keys()) - adapter.full.keys()
    if missing and "needs" in adapter.provenance:
        raise SystemExit(f"{source}: {len(missing)} tensors are those of the attempt that it went on from")
    kept = {name: value for name, value in adapter.provenance.items() if name != "needs"}
    adapter = replace(adapter, base="tiny-flux2", provenance=kept)
    adapter.save(target, card(adapter, folder, "adapter"), overwrite=True)
    print(f"shipped {target}", flush=True)
