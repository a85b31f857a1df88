"""A pixel model made from nothing: an untrained pipeline folder that finetune, sample and compare take like any other.

The noise of a token lives in the r leading directions of the images' patches (Sec. 4: PCA of their uncentered second moments), s is
1, and nothing is left of a latent model: there is no reference, and what trains it is the plain flow loss.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from liftkit.checkpoint.card import front_matter
from liftkit.checkpoint.classes import CLASS_PIPELINE
from liftkit.checkpoint.files import read_safetensors, write_safetensors, write_text
from liftkit.checkpoint.folder import RECORD, atomic_folder, manifest
from liftkit.checkpoint.model import STEM
from liftkit.checkpoint.record import BEGUN, versions
from liftkit.checkpoint.text import lines, read_text
from liftkit.color import SRGB, ColorSpace, Oklab, to_signed
from liftkit.conversion.card import ASYMFLOW, pipeline_file
from liftkit.conversion.networks import NETWORKS, Shape
from liftkit.data import demo
from liftkit.data.captioned import CaptionedFolder, DemoCaptioned
from liftkit.data.images import check_folder
from liftkit.data.picture_errors import PictureError
from liftkit.data.source import CaptionedSource
from liftkit.embedded import DEMO
from liftkit.errors import UsageError
from liftkit.fit.moments import TokenMoments
from liftkit.fit.pca import fit_pca
from liftkit.fit.rank import AutoRank, auto_rank
from liftkit.lift import Lift
from liftkit.models.jit_names import read_original
from liftkit.models.registry import architecture, lifted_class
from liftkit.models.spec import Architecture
from liftkit.models.surgery import free_basis
from liftkit.options import InitOptions
from liftkit.progress import Observer, Silent
from liftkit.tally import Tally
from liftkit.tokens import patchify

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
            shape = _shape(options, len(names))
            kind, config_of = NETWORKS[options.architecture]
            spec, config = architecture(kind), config_of(shape)
            lift, chosen = _subspace(options, shape, observer or Silent())
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
    path = Path(classes).expanduser()
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
    twice = (
        next((name for name in names if plain.count(name.casefold()) > 1), None)
        if len(set(plain)) < len(plain)
        else None
    )
    if twice is not None:
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
        model = lifted_class(spec)(**config, lift_rank=lift.rank, lift_dim=lift.dim, lift_scale=1.0)
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
        lift = Lift(found.basis, 1.0, patch, 1, color_of(color), {"kind": "imported"})
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


def _shape(options: InitOptions, classes: int) -> Shape:
    tiny = options.size == "tiny"
    patch = options.patch or (8 if tiny else 16)
    resolution = options.resolution or (8 if tiny else 16) * patch
    if resolution % patch:
        raise UsageError(f"--resolution {resolution}: not a multiple of the {patch} pixels of one token")
    if options.architecture == "flux2" and (patch < 2 or patch & (patch - 1)):
        raise UsageError(f"--patch {patch}: flux2 folds pixels by half a token, which has to be a power of two")
    if options.rank != "auto" and options.rank > 3 * patch**2:
        raise UsageError(f"--rank {options.rank}: a token of {patch} x {patch} pixels has {3 * patch**2} numbers")
    return Shape(options.size, patch, resolution, classes)


def _subspace(options: InitOptions, shape: Shape, observer: Observer) -> tuple[Lift, AutoRank | None]:
    """The free lift of a model: given, fitted, or one that no images decide."""
    color, dim, rank = color_of(options.color), 3 * shape.patch**2, options.rank
    if rank in (0, dim):
        basis = torch.eye(dim, int(rank), dtype=torch.float64)
        return Lift(basis, 1.0, shape.patch, 1, color, {"kind": "none" if rank == 0 else "identity"}), None
    if options.subspace is not None:
        lift = Lift.load(options.subspace)
        _check_given(lift, options, shape, color)
        return replace(lift, basis=lift.basis[:, : int(rank)]) if rank != "auto" else lift, None
    if options.images is None:
        raise UsageError(
            f"--rank {rank}: needs the leading directions of images: give a folder by --images ('demo' for the embedded "
            "ones), or a lift by --subspace; ranks 0 and all do without"
        )
    moments = patch_moments(options, shape, color, observer)
    chosen = None
    if rank == "auto":
        chosen = auto_rank(moments.pixel_gram, moments.count)
        rank = chosen.rank
        if rank == 0:
            return _subspace(replace(options, rank=0), shape, observer)[0], chosen
    try:
        return fit_pca(moments, rank=rank, color=color), chosen
    except ValueError as error:
        raise UsageError(f"--images {options.images}: {error}") from error


def color_of(name: str) -> ColorSpace:
    """The color space of ``--color``: sRGB in [-1, 1], or Oklab with the paper's constants."""
    return SRGB() if name == "srgb" else Oklab()


def _check_given(lift: Lift, options: InitOptions, shape: Shape, color: ColorSpace) -> None:
    """Raise unless a given lift is of the network's patches and colors, and holds the directions that are asked for."""
    if lift.patch_size != shape.patch:
        raise UsageError(
            f"--subspace {options.subspace}: of patches of {lift.patch_size} pixels, the network's tokens have {shape.patch}"
        )
    if lift.color.to_dict() != color.to_dict():
        raise UsageError(
            f"--subspace {options.subspace}: fitted in other colors ({lift.color.to_dict()}) than --color {options.color} has; "
            "fit it by --images here, or give its colors"
        )
    if options.rank == "auto":
        raise UsageError("--rank auto: looks at images; give them by --images in the place of --subspace")
    if options.rank > lift.rank:
        raise UsageError(f"--rank {options.rank}: {options.subspace} holds {lift.rank} directions")


def patch_moments(options: InitOptions, shape: Shape, color: ColorSpace, observer: Observer) -> TokenMoments:
    """Second moments of the patches of images and of their mirror images.

    Raises:
        UsageError: if there is no usable image.
    """
    dim, size = 3 * shape.patch**2, (shape.resolution, shape.resolution)
    source = _source(options)
    order = np.random.Generator(np.random.PCG64(options.seed)).permutation(len(source))[: options.num_images].tolist()
    moments, tally = TokenMoments(1, dim), Tally("images")
    with observer.stage("init: reading images", len(order), "images") as advance:
        for place in order:
            try:
                image = source.image(place, size)
                tally.use()
            except PictureError as error:
                tally.leave_out(error.name, error.reason)
            else:
                tokens = patchify(color.encode(to_signed(image[None])).double(), shape.patch)
                moments.update(tokens[..., :1], tokens)
            advance(1)
    if tally.lost:
        observer.note(tally.summary())
    if not moments.count:
        raise UsageError(f"--images {options.images}: no usable image: {tally.reasons()}")
    mirror = torch.arange(dim).reshape(3, shape.patch, shape.patch).flip(2).flatten()
    mirrored = TokenMoments(1, dim)
    mirrored.count, mirrored.images = moments.count, 0
    mirrored.pixel_sum, mirrored.pixel_gram = moments.pixel_sum[mirror], moments.pixel_gram[mirror][:, mirror]
    mirrored.latent_sum, mirrored.latent_gram, mirrored.cross = (
        mirrored.pixel_sum[:1],
        mirrored.pixel_gram[:1, :1],
        mirrored.pixel_gram[:1],
    )
    return moments + mirrored


def _source(options: InitOptions) -> CaptionedSource:
    """The images, brought to a size as training does it."""
    assert options.images is not None
    if options.images == DEMO:
        return DemoCaptioned(options.num_images, seed=options.seed)
    check_folder(Path(options.images).expanduser(), f"--images {options.images}", "give a folder of images, or 'demo'")
    return CaptionedFolder(options.images)


def _write(
    building: Path, spec: Architecture, model: Any, lift: Lift, shape: Shape, names: list[str], options: InitOptions
) -> None:
    from liftkit.models.autoencoder import PixelAutoencoder

    cell = spec.latent_patch(model.config)
    autoencoder = PixelAutoencoder(
        fold=shape.patch // cell, latent_patch=cell, color=lift.color.to_dict(), sample_size=shape.resolution
    )
    for name, part in (("transformer", model), ("vae", autoencoder)):
        (building / name).mkdir()
        write_text(building / name / "config.json", part.to_json_string())
        write_safetensors(building / name / f"{STEM}.safetensors", _tensors(part), {"format": "pt"})
    (building / "scheduler").mkdir()
    scheduler = {"_class_name": "AsymFlowMatchEulerDiscreteScheduler", **SAMPLING}
    write_text(building / "scheduler" / "scheduler_config.json", json.dumps(scheduler, indent=2) + "\n")
    index = {
        "_class_name": CLASS_PIPELINE,
        "id2label": {str(number): name for number, name in enumerate(names)},
        "transformer": ["diffusers", spec.lifted_name],
        "vae": ["diffusers", "PixelAutoencoder"],
        "scheduler": ["diffusers", scheduler["_class_name"]],
    }
    write_text(building / "model_index.json", json.dumps(index, indent=2, ensure_ascii=False) + "\n")
    write_text(building / "pipeline.py", pipeline_file(CLASS_PIPELINE))
    lift.save(building / "lift.safetensors")
    write_text(building / "README.md", card(spec, lift, shape))
    plain = {name: Path(value).name if isinstance(value, Path) else value for name, value in vars(options).items()}
    if options.images is not None:
        plain["images"] = Path(options.images).name
    plain["classes"] = Path(options.classes).name
    record = {
        "format": BEGUN,
        "version": 1,
        "options": {name: value for name, value in plain.items() if name != "overwrite"},
        "versions": versions(),
        "sha256": manifest(building),
    }
    write_text(building / RECORD, json.dumps(record, indent=2) + "\n")


def _tensors(model: Any) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}


def card(spec: Architecture, lift: Lift, shape: Shape) -> str:
    """README.md of an untrained model."""
    return f"""{front_matter({})}
# An untrained pixel model of {shape.classes} classes

A `{spec.name}` whose noise has {lift.rank} of the {lift.dim} directions of a token ({ASYMFLOW}), with random weights.
Train it with liftkit: `model: this-folder`, `objective.loss: flow`, `trainable.mode: full`.

```python
import liftkit
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("path/to/this/folder")
image = pipe(class_labels=[0]).images[0]
```
"""
