"""``liftkit fit``: a lift without a conversion, shared among machines where one is not enough."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from liftkit.cli import console
from liftkit.cli.convert import data_rows, lift_rows
from liftkit.options import Argument, FitOptions, Option

if TYPE_CHECKING:
    from liftkit.fit.job import FitJob


def fit(
    sources: Annotated[
        list[str],
        Argument("Model: a diffusers folder or a Hub id; with --merge, files of moments.", "MODEL", names="model"),
    ],
    output: Annotated[
        Path | None, Option("Lift to write (.safetensors).", "FILE", ("--output", "-o"), default="none")
    ] = None,
    part: Annotated[
        str | None,
        Option("Share of the images to look at, such as 3/8; needs --moments-out.", "PART", default="all images"),
    ] = None,
    moments_out: Annotated[
        Path | None, Option("File to write the moments to, instead of fitting on them.", "FILE", default="none")
    ] = None,
    merge: Annotated[bool, Option("Fit on the sum of the given files of moments.")] = False,
    *,
    options: FitOptions,
) -> None:
    """Fit a lift without converting a model.

    Its kind is Procrustes, PCA or Jacobian. An interrupted fit continues, and several machines can share one.

    Example: liftkit fit black-forest-labs/FLUX.2-klein-base-4B --images photos/ -o lift.safetensors
    """
    console.first_word(f"reading {', '.join(sources)}")
    from liftkit.fit.job import FitJob, prepare

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
