"""Carry out a plan: fit, rewrite, write the folder, prove it; the output appears whole or not at all."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from liftkit.checkpoint.files import write_safetensors, write_text
from liftkit.checkpoint.folder import atomic_folder, link_or_copy, manifest
from liftkit.checkpoint.model import STEM
from liftkit.checkpoint.rewrite import read_tensor, rewrite_file
from liftkit.convert.card import model_card, pipeline_file, versions
from liftkit.convert.plan import ConvertOptions, Plan, make_plan
from liftkit.convert.surgery import BASIS, lifted_config, lifted_tensors
from liftkit.convert.verify import Proof, prove
from liftkit.data.images import ImageSource, batches, open_images
from liftkit.fit.alignment import alignment
from liftkit.fit.procrustes import fit_procrustes
from liftkit.fit.stream import Collected, collect, fitted_color, normalised
from liftkit.lift import Lift
from liftkit.models.latents import LatentSpace
from liftkit.progress import Observer, Silent
from liftkit.report.pages import alignment_page
from liftkit.report.pictures import Row
from liftkit.tokens import patchify, unpatchify

PIXELS_AT_ONCE = 4 * 1024 * 1024


@dataclass
class Conversion:
    """A finished conversion.

    Args:
        plan: what was done.
        lift: what was used.
        figures: of the alignment, ``fitted`` and ``held_out``; empty tables where a saved lift was reused.
        proof: that the output does what its source does.
        gallery: a few of the images, their VAE reconstructions and their lift, where images were given.
        skipped: one line on images that could not be used, or empty.
    """

    plan: Plan
    lift: Lift
    figures: dict[str, Any]
    proof: Proof
    gallery: list[Row]
    skipped: str = ""

    @property
    def output(self) -> Path:
        """The converted folder."""
        return self.plan.output


def convert(
    model: str, output: str | Path, options: ConvertOptions | None = None, observer: Observer | None = None, **choices: Any
) -> Conversion:
    """Convert a latent flow pipeline into a pixel pipeline: plan, fit, surgery, write, prove.

    Args:
        model: a diffusers folder or a Hub id.
        output: the folder to make.
        options: see :class:`liftkit.convert.plan.ConvertOptions`; or give its fields as keywords.
        observer: hears of the progress.

    Raises:
        UsageError: bad input; nothing was written.
        ProofError: the converted model does not do what its source does; nothing was left behind.
        LiftkitError: the disk refused.
    """
    if options is not None and choices:
        raise TypeError("convert: give options or keywords, not both")
    plan = make_plan(model, Path(output), options or ConvertOptions(**choices))
    return execute(plan, observer or Silent())


def execute(plan: Plan, observer: Observer) -> Conversion:
    """Carry out a plan; see :func:`convert`."""
    source = _images(plan)
    fit = _fit(plan, source, observer)
    with atomic_folder(plan.output, overwrite=plan.options.overwrite) as building:
        _write_components(plan, fit.lift, building)
        write_transformer(plan, fit.lift, building, observer)
        proof = prove(
            plan.model.path,
            building,
            plan.spec,
            fit.lift,
            device=plan.options.device,
            steps=plan.options.proof_steps,
            seed=plan.options.seed,
            observer=observer,
        )
        skipped = source.skipped.summary() if source is not None else ""
        result = Conversion(plan, fit.lift, fit.figures, proof, fit.gallery, skipped)
        _write_report(result, source, building, observer)
    return result


@dataclass
class _Fit:
    """A lift, its figures and pictures."""

    lift: Lift
    figures: dict[str, Any]
    gallery: list[Row]


def _images(plan: Plan) -> ImageSource | None:
    options = plan.options
    return open_images(options.images, options.num_images or 0, options.seed) if options.images else None


def _fit(plan: Plan, source: ImageSource | None, observer: Observer) -> _Fit:
    """The lift of a plan: a given one, or fitted to the latents of images."""
    if source is None:
        assert plan.lift is not None
        return _Fit(plan.lift, plan.lift.figures.get("alignment", {}), [])
    space = open_latents(plan)
    if plan.lift is not None:
        figures = plan.lift.figures.get("alignment", {})
        return _Fit(plan.lift, figures, pictures(space, source, plan.lift, plan.options.resolution or 0))
    options = plan.options
    assert options.resolution is not None
    name, fixed = color_choice(options.color)
    collected = collect(
        space,
        source,
        name,
        latent_patch=plan.latent_patch,
        resolution=options.resolution,
        batch_size=max(1, min(16, len(source) // 8, PIXELS_AT_ONCE // options.resolution**2)),
        observer=observer,
    )
    lift, figures = fit_collected(plan, collected, name, fixed)
    return _Fit(lift, figures, pictures(space, source, lift, options.resolution))


@torch.no_grad()
def pictures(space: LatentSpace, source: ImageSource, lift: Lift, resolution: int, count: int = 8) -> list[Row]:
    """A few images of a source, their VAE reconstructions and their lift s A z."""
    stream = source.images(resolution, lift.patch_size)
    images = next(batches(islice(stream, count), count)).to(space.vae.device)
    height, width = images.shape[-2:]
    latents = space.encode(images)
    tokens = lift.raise_tokens(patchify(latents, lift.latent_patch))
    lifted = lift.color.decode(unpatchify(tokens, lift.patch_size, height, width))
    return [
        Row("Images: as they are", images),
        Row("VAE: encoded and decoded, what the latent model can show at best", space.decode(latents)),
        Row("Lift s A z: the latents carried into pixels by one rotation and one scale", lifted),
    ]


def fit_collected(plan: Plan, collected: Collected, name: Any, fixed: bool) -> tuple[Lift, dict[str, Any]]:
    """Fit on moments of plain colour values, and take the figures on both halves."""
    from liftkit.errors import UsageError

    color = name() if fixed else fitted_color(name, collected.fitted)
    try:
        fitted = normalised(collected.fitted, color)
        lift = fit_procrustes(fitted, latent_patch=plan.latent_patch, color=color)
    except ValueError as error:
        raise UsageError(f"--images {plan.options.images}: {error}") from error
    figures = {"fitted": alignment(lift, fitted)}
    if collected.held_out.count:
        figures["held_out"] = alignment(lift, normalised(collected.held_out, color))
    lift.figures["alignment"] = figures
    return lift, figures


def color_choice(name: str) -> tuple[Any, bool]:
    """The colour space class of a ``--color`` name, and whether its published constants are to be used.

    Raises:
        UsageError: if there is no such name.
    """
    from liftkit.color import SPACES
    from liftkit.errors import UsageError

    space = SPACES.get(name.removesuffix("-paper"))
    if space is None:
        raise UsageError(f"--color {name}: unknown; choose oklab, srgb or oklab-paper")
    return space, name.endswith("-paper")


def open_latents(plan: Plan) -> LatentSpace:
    """The source's VAE, in float32 on the plan's device."""
    import diffusers

    vae_class = getattr(diffusers, plan.model.class_of("vae") or "")
    vae = vae_class.from_pretrained(plan.model.path, subfolder="vae", torch_dtype=torch.float32)
    return LatentSpace(vae.to(plan.options.device).eval().requires_grad_(False))


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
        changed = {k: v.to(torch.float32 if k == BASIS else dtype) for k, v in lifted_tensors(plan.spec, wide.get, lift).items()}
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


def _reference(plan: Plan) -> dict[str, str]:
    """The tensors of the projections and of the modules that finetuning trains in full, and their shards."""
    paths = [projection.path for projection, _ in plan.spec.projections] + list(plan.spec.reference)
    return {name: shard for name, shard in plan.weights.where.items() if any(name.startswith(f"{p}.") for p in paths)}


def _plain(name: str) -> str:
    """A shard's file name without a variant: ``model.fp16-00001-of-2.safetensors`` holds no fp16 file's sibling."""
    stem, rest = name[: len(STEM)], name[len(STEM) :]
    numbered = rest.find("-")
    return stem + (rest[numbered:] if numbered >= 0 else ".safetensors")


def _write_components(plan: Plan, lift: Lift, building: Path) -> None:
    """Everything but the transformer: index, pixel autoencoder, scheduler, and the source's other components."""
    from liftkit.models.autoencoder import PixelAutoencoder

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


def _write_report(result: Conversion, images: ImageSource | None, building: Path, observer: Observer) -> None:
    """Alignment page and figures, model card, and last the manifest."""
    plan = result.plan
    figures = {
        "rank": result.lift.rank,
        "dim": result.lift.dim,
        "scale": result.lift.scale,
        "color": result.lift.color.to_dict(),
        "fit": {key: value for key, value in result.lift.figures.items() if key != "alignment"},
        "alignment": result.figures,
        "proof": result.proof.to_dict(),
        "images": images.describe() if images is not None else {"source": "lift", "name": str(plan.options.lift)},
    }
    write_text(building / "alignment.json", json.dumps(figures, indent=2) + "\n")
    name = plan.model.source.rstrip("/").rsplit("/", 1)[-1]
    write_text(building / "alignment.html", alignment_page(f"{name}, lifted to pixels", figures, result.gallery))
    write_text(building / "README.md", model_card(result))
    with observer.stage("write: checksums", None, "files"):
        record = {
            "format": "liftkit.conversion",
            "version": 1,
            "source": {"model": plan.model.source, "class": plan.spec.name, "pipeline": plan.model.index["_class_name"]},
            "options": _plain_options(plan.options),
            "versions": versions(),
            **{key: figures[key] for key in ("rank", "dim", "scale", "color", "fit", "proof", "images")},
            "sha256": manifest(building),
        }
    write_text(building / "liftkit.json", json.dumps(record, indent=2) + "\n")


def _plain_options(options: ConvertOptions) -> dict[str, Any]:
    return {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}


def _umask() -> int:
    import os

    mask = os.umask(0)
    os.umask(mask)
    return mask


def reference_tensors(folder: Path) -> dict[str, Tensor]:
    """The source's projections and output norm, as a converted folder keeps them."""
    from liftkit.checkpoint.files import read_safetensors

    return read_safetensors(folder / "latent" / "reference.safetensors")[0]
