"""``liftkit fit``: a lift without a conversion, shared among machines where one is not enough."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from liftkit.cli import console
from liftkit.cli.convert import (
    ColorOption,
    Device,
    Images,
    Kind,
    KindOption,
    Latents,
    LatentsOption,
    NumImages,
    Prompts,
    Resolution,
    Scale,
    ScaleOption,
    Seed,
    VaeOption,
    data_rows,
    lift_rows,
    number_of_images,
)

if TYPE_CHECKING:
    from liftkit.fit.job import FitJob


def fit(
    sources: Annotated[
        list[str],
        typer.Argument(metavar="MODEL", help="A diffusers folder or a Hub id; with --merge, files of moments."),
    ],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The lift to write (.safetensors).")] = None,
    images: Images = None,
    num_images: NumImages = None,
    resolution: Resolution = None,
    kind: KindOption = Kind.procrustes,
    scale: ScaleOption = Scale.norm,
    rank: Annotated[int | None, typer.Option(min=1, help="Of a PCA subspace for training from scratch.")] = None,
    latents: LatentsOption = Latents.images,
    prompts: Prompts = None,
    color: ColorOption = None,
    vae: VaeOption = None,
    part: Annotated[
        str | None, typer.Option(help="Take a share of the images, such as 3/8, for --moments-out.")
    ] = None,
    moments_out: Annotated[Path | None, typer.Option(help="Write the moments instead of fitting.")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Fit on the sum of the moments that are given.")] = False,
    device: Device = "auto",
    seed: Seed = 0,
) -> None:
    """Fit a lift: procrustes, PCA or Jacobian; interrupted fits resume, and many machines can share one.

    Example: liftkit fit black-forest-labs/FLUX.2-klein-base-4B --images photos/ -o lift.safetensors
    """
    from liftkit.fit.engine import FitOptions
    from liftkit.fit.job import FitJob, prepare

    options = FitOptions(
        images=images,
        num_images=number_of_images(num_images),
        resolution=resolution,
        kind=kind.value,
        scale=scale.value,
        rank=rank,
        latents=latents.value,
        prompts=prompts,
        color=None if color is None else color.value,
        vae=vae,
        device=device,
        seed=seed,
    )
    job = prepare(FitJob(tuple(sources), options, output, part, moments_out, merge))
    console.table("Fit", _rows(job))
    console.quiet_libraries()
    console.resumable()
    _report(job)


def _rows(job: FitJob) -> list[tuple[str, str]]:
    rows = [("moments", ", ".join(map(str, job.moments)))] if job.merge else []
    if job.subject is None:
        return rows
    rows.append(("model", f"{job.subject.model.source} ({job.subject.spec.name})"))
    if not job.merge:
        rows += data_rows(job.subject, job.options)
    return [*rows, *([("part", job.part)] if job.part else []), ("device", job.options.device)]


def _report(job: FitJob) -> None:
    from liftkit.fit.job import run
    from liftkit.report.data import Report

    done = run(job, console.Bars())
    console.result(output=job.output or done.moments, images=done.images, resumed=done.resumed)
    console.tallies(done.tallies)
    if done.lift is not None and job.output is not None:
        console.result(report=Report(job.output.stem, done.lift).to_dict())
        rows = lift_rows(done.lift)
        console.table("Fitted", [*rows, ("lift", str(job.output)), ("next", f"liftkit report {job.output}")])
    elif done.moments is not None:
        console.table("Gathered", [("images", str(done.images)), ("moments", str(done.moments))])
    if done.resumed:
        console.note(f"{done.resumed} images had been seen by an interrupted run")
