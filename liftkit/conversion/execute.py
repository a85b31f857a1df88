"""Carry out a plan: fit, rewrite, write the folder, prove it; the output appears whole or not at all."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from liftkit.checkpoint.files import write_text
from liftkit.checkpoint.folder import atomic_folder, manifest, tree_size
from liftkit.conversion.card import model_card, versions
from liftkit.conversion.fitting import fit_plan, plan_images
from liftkit.conversion.plan import ConvertOptions, Plan, make_plan
from liftkit.conversion.verify import Proof, prove
from liftkit.conversion.write import write_components, write_transformer
from liftkit.data.images import ImageSource
from liftkit.lift import Lift
from liftkit.progress import Observer, Silent
from liftkit.report.pages import alignment_page
from liftkit.report.pictures import Row


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
    model: str,
    output: str | Path,
    options: ConvertOptions | None = None,
    observer: Observer | None = None,
    **choices: Any,
) -> Conversion:
    """Convert a latent flow pipeline into a pixel pipeline: plan, fit, surgery, write, prove.

    Args:
        model: a diffusers folder or a Hub id.
        output: the folder to make.
        options: see :class:`liftkit.conversion.plan.ConvertOptions`; or give its fields as keywords.
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
    source = plan_images(plan)
    fit = fit_plan(plan, source, observer)
    with atomic_folder(plan.output, overwrite=plan.options.overwrite) as building:
        write_components(plan, fit.lift, building)
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
        "images": _describe(plan.options, images),
    }
    write_text(building / "alignment.json", json.dumps(figures, indent=2) + "\n")
    name = plan.model.name.rsplit("/", 1)[-1]
    write_text(building / "alignment.html", alignment_page(f"{name}, lifted to pixels", figures, result.gallery))
    write_text(building / "README.md", model_card(result))
    with observer.stage("write: checksums", tree_size(building), "bytes") as advance:
        checksums = manifest(building, advance)
    source = {"model": plan.model.name, "class": plan.spec.name, "pipeline": plan.model.index["_class_name"]}
    record = {
        "format": "liftkit.conversion",
        "version": 1,
        "source": source,
        "options": _plain_options(plan.options),
        "versions": versions(),
        **{key: figures[key] for key in ("rank", "dim", "scale", "color", "fit", "proof", "images")},
        "sha256": checksums,
    }
    write_text(building / "liftkit.json", json.dumps(record, indent=2) + "\n")


def _describe(options: ConvertOptions, images: ImageSource | None) -> dict[str, Any]:
    if images is not None:
        return images.describe()
    return {"source": "lift", "name": options.lift.name if options.lift else ""}


def _plain_options(options: ConvertOptions) -> dict[str, Any]:
    """Options as plain data; of paths the name alone, for the folder may be published."""
    paths = {"images": Path(options.images).name if options.images else None}
    return {**vars(options), **paths, "lift": options.lift.name if options.lift else None}
