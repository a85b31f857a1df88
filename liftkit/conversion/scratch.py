"""A model made from nothing: an untrained pipeline folder that finetune, sample and compare take like any other.

It is of pixels, or of a VAE's latents. The noise of a token lives in the r leading directions of what it is of
(:mod:`liftkit.conversion.subspace`), s is 1, and there is no reference: what trains it is the plain flow loss.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from liftkit.checkpoint.card import front_matter
from liftkit.checkpoint.classes import CLASS_PIPELINE
from liftkit.checkpoint.components import read_vae
from liftkit.checkpoint.copying import copy_file
from liftkit.checkpoint.files import expanded, read_safetensors, write_safetensors, write_text
from liftkit.checkpoint.folder import atomic_folder
from liftkit.checkpoint.model import STEM
from liftkit.checkpoint.record import BEGUN, versions, write_record
from liftkit.checkpoint.text import lines, read_text
from liftkit.conversion.card import ASYMFLOW, pipeline_file
from liftkit.conversion.networks import NETWORKS, Shape
from liftkit.conversion.subspace import COLORS, shape_of, subspace
from liftkit.data import demo
from liftkit.errors import UsageError
from liftkit.fit.rank import AutoRank
from liftkit.lift import Lift
from liftkit.models.jit_names import read_original
from liftkit.models.registry import architecture, lifted_class
from liftkit.models.spec import Architecture
from liftkit.models.surgery import free_basis
from liftkit.options import InitOptions
from liftkit.progress import Observer, Silent

SAMPLING = {"num_train_timesteps": 1000, "shift": 1.0, "lift_scale": 1.0, "use_dynamic_shifting": False}
MOST_CLASSES = 1_000_000


@dataclass(frozen=True)
class Begun:
    """What was made.

    Args:
        folder: the model.
        lift: its subspace.
        parameters: of the network.
        name: of the network's class.
        chosen: how the rank was found, where that was asked for.
    """

    folder: Path
    lift: Lift
    parameters: int
    name: str
    chosen: AutoRank | None


def begin(output: Path, options: InitOptions, observer: Observer | None = None) -> Begun:
    """Make an untrained model.

    Args:
        output: the folder; it appears whole or not at all.
        options: what is made.
        observer: shows the pass over the images.

    Raises:
        UsageError: if choices do not go together, the subspace is of other patches, or there are no classes or images.
    """
    names = class_names(options.classes)
    with atomic_folder(output, overwrite=options.overwrite) as building:
        if options.weights is not None:
            (spec, model, lift, shape), chosen = of_the_authors(options.weights, options.color, len(names)), None
        else:
            given = None if options.subspace is None else Lift.load(options.subspace)
            vae = None if options.vae is None else read_vae(expanded(options.vae))
            shape = shape_of(options, len(names), given, vae)
            kind, config_of = NETWORKS[options.architecture]
            spec, config = architecture(kind), config_of(shape)
            lift, chosen = subspace(options, shape, given, observer or Silent())
            model = network(spec, config, lift, options.seed)
        _write(building, spec, model, lift, shape, names, options)
    return Begun(output, lift, sum(each.numel() for each in model.parameters()), spec.lifted_name, chosen)


def class_names(classes: str) -> list[str]:
    """The names of ``--classes``, in order.

    Raises:
        UsageError: if there are none, or two alike.
    """
    if classes == "demo":
        return list(demo.DIGITS)
    if classes.isdecimal():
        if not 1 <= int(classes) <= MOST_CLASSES:
            raise UsageError(f"--classes {classes}: expected 1 to {MOST_CLASSES}")
        return [str(number) for number in range(int(classes))]
    path = expanded(classes)
    if path.is_dir():
        names = sorted(each.name for each in path.iterdir() if each.is_dir() and not each.name.startswith("."))
        nothing = "no folders in it; give one with a folder for each class"
    elif path.is_file():
        names = [line.strip() for _, line in lines(read_text(path))]
        nothing = "no names in it; write one in each line"
    else:
        raise UsageError(f"--classes {classes}: no such file or folder; give one, a number, or 'demo'")
    if not names:
        raise UsageError(f"--classes {classes}: {nothing}")
    plain = [name.casefold() for name in names]
    if len(set(plain)) < len(plain):
        twice = next(name for name in names if plain.count(name.casefold()) > 1)
        raise UsageError(f"--classes {classes}: {twice!r} is there twice; each class has a name of its own")
    return names


def network(spec: Architecture, config: dict[str, Any], lift: Lift, seed: int) -> Any:
    """The untrained Asym twin of a network.

    Args:
        spec: its architecture.
        config: of the stock class, with the channels of pixels.
        lift: free, of the network's own patches.
        seed: of the weights.

    Raises:
        UsageError: if the network cannot begin with that subspace.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = lifted_class(spec)(
            **config, lift_rank=lift.rank, lift_dim=lift.dim, lift_scale=1.0, lift_space=lift.space
        )
    with torch.no_grad():
        for projection in spec.outputs:
            for parameter in model.get_submodule(projection.path).parameters():
                parameter.zero_()  # the first answer is 0, whatever the stock class would begin with
        model.lift.basis.copy_(free_basis(lift, spec, model.config))
        begin_with = getattr(model, "begin_with", None)
        if begin_with is not None and 0 < lift.rank < lift.dim:
            try:
                begin_with(lift.basis)
            except ValueError as error:
                raise UsageError(f"--rank {lift.rank}: {error}") from error
    return model.eval()


def of_the_authors(path: Path, color: Literal["srgb", "oklab"], classes: int) -> tuple[Architecture, Any, Lift, Shape]:
    """A JiT with the weights of a file under its authors' names, of the rank that the file says: 0 for JiT itself.

    Raises:
        UsageError: if it is no file of theirs, or of another number of classes.
    """
    try:
        found = read_original(read_safetensors(path)[0])
        patch = found.config["patch_size"]
        lift = Lift(found.basis, 1.0, patch, 1, COLORS[color], {"kind": "imported"})
    except ValueError as error:
        raise UsageError(f"--weights {path}: {error}") from error
    if found.config["num_classes"] != classes:
        raise UsageError(
            f"--weights {path}: of {found.config['num_classes']} classes, --classes names {classes}; give as many names"
        )
    spec = architecture("JiTTransformer2DModel")
    model = network(spec, found.config, lift, 0)
    model.load_state_dict({**found.tensors, "lift.basis": model.lift.basis}, strict=True)
    return spec, model, lift, Shape("B", patch, found.config["sample_size"], classes)


def _write(
    building: Path, spec: Architecture, model: Any, lift: Lift, shape: Shape, names: list[str], options: InitOptions
) -> None:
    (building / "transformer").mkdir()
    _write_model(building / "transformer", model)
    (building / "vae").mkdir()
    if shape.vae is None:
        from liftkit.models.autoencoder import PixelAutoencoder

        cell = spec.latent_patch(model.config)
        color = lift.color.to_dict()
        _write_model(building / "vae", PixelAutoencoder(shape.patch // cell, cell, color, sample_size=shape.resolution))
    else:
        for name, file in shape.vae.files.items():
            copy_file(file, building / "vae" / name)
    (building / "scheduler").mkdir()
    scheduler = {"_class_name": "AsymFlowMatchEulerDiscreteScheduler", **SAMPLING}
    write_text(building / "scheduler" / "scheduler_config.json", json.dumps(scheduler, indent=2) + "\n")
    index = {
        "_class_name": CLASS_PIPELINE,
        "sample_size": shape.resolution,
        "id2label": {str(number): name for number, name in enumerate(names)},
        "transformer": ["diffusers", spec.lifted_name],
        "vae": ["diffusers", "PixelAutoencoder" if shape.vae is None else shape.vae.class_name],
        "scheduler": ["diffusers", scheduler["_class_name"]],
    }
    write_text(building / "model_index.json", json.dumps(index, indent=2, ensure_ascii=False) + "\n")
    write_text(building / "pipeline.py", pipeline_file(CLASS_PIPELINE))
    lift.save(building / "lift.safetensors")
    write_text(building / "README.md", card(spec, lift, shape))
    plain = {name: Path(value).name if isinstance(value, Path) else value for name, value in vars(options).items()}
    for name in ("images", "classes", "vae"):
        if plain[name] is not None:
            plain[name] = Path(plain[name]).name
    record = {
        "format": BEGUN,
        "version": 1,
        "options": {name: value for name, value in plain.items() if name != "overwrite"},
        "versions": versions(),
    }
    write_record(building, record)


def _write_model(folder: Path, model: Any) -> None:
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    write_text(folder / "config.json", model.to_json_string())
    write_safetensors(folder / f"{STEM}.safetensors", tensors, {"format": "pt"})


def card(spec: Architecture, lift: Lift, shape: Shape) -> str:
    """README.md of an untrained model."""
    return f"""{front_matter({})}
# An untrained model of {"pixels" if shape.vae is None else "latents"} and {shape.classes} classes

A `{spec.name}` whose noise has {lift.rank} of the {lift.dim} directions of a token ({ASYMFLOW}), with random weights.
Train it with liftkit: `model: this-folder`, `objective.loss: flow`, `trainable.mode: full`.

```python
import liftkit
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("path/to/this/folder")
image = pipe(class_labels=[0]).images[0]
```
"""
