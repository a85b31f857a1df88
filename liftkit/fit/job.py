"""What ``liftkit fit`` does, as functions: one machine, a part of many, or the sum of their moments."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from liftkit.checkpoint.files import check_file, output_file
from liftkit.errors import UsageError
from liftkit.fit.distributed import Processes
from liftkit.fit.engine import color_names, fit_collected, fit_pass
from liftkit.fit.folds import FoldedMoments, read_folds, write_folds
from liftkit.fit.source import open_source
from liftkit.fit.stream import Collection, Pass
from liftkit.fit.subject import Subject, check_sources, choose, inspect_model, note_images
from liftkit.lift import Lift
from liftkit.options import FitOptions
from liftkit.progress import Observer
from liftkit.tally import Tally

ENDING = ".safetensors"


@dataclass
class FitJob:
    """One call of ``liftkit fit``.

    Args:
        sources: a diffusers folder or a Hub id; with ``merge``, files of moments, and a model only for pictures.
        options: of the fit.
        output: the lift to write; not needed with ``moments_out``.
        part: a share of the images, such as ``3/8``.
        moments_out: write the moments here instead of fitting.
        merge: add moments and fit on them, instead of on images.
        subject: the checked model, filled in by :func:`prepare`; None where moments alone are merged.
    """

    sources: tuple[str, ...]
    options: FitOptions
    output: Path | None = None
    part: str | None = None
    moments_out: Path | None = None
    merge: bool = False
    subject: Subject | None = field(default=None, repr=False)

    @property
    def moments(self) -> tuple[Path, ...]:
        """The files to merge."""
        return tuple(Path(source) for source in self.sources if source.endswith(".safetensors")) if self.merge else ()

    @property
    def models(self) -> tuple[str, ...]:
        """What is left of the sources: a model, where there is one."""
        return tuple(source for source in self.sources if Path(source) not in self.moments)


@dataclass
class FitDone:
    """What a fit made: a lift, or moments; and what it has to say about its images."""

    lift: Lift | None = None
    moments: Path | None = None
    images: int = 0
    resumed: int = 0
    tallies: list[Tally] = field(default_factory=list)


def prepare(job: FitJob) -> FitJob:
    """Check everything that can be checked before work begins, and make the automatic choices.

    Raises:
        UsageError: naming the flag that is wrong.
    """
    if (job.output is None) == (job.moments_out is None):
        raise UsageError("give either -o LIFT, or --moments-out FILE for one part of many")
    if job.part is not None and job.moments_out is None:
        raise UsageError("--part needs --moments-out: a part alone is no fit; add the parts by --merge")
    if job.options.rank is not None and job.options.kind != "pca":
        raise UsageError("--rank is for --kind pca: other fits have the rank of the latents")
    if job.options.space == "latent" and job.options.rank is None:
        raise UsageError(
            "--space latent needs --rank, and so --kind pca: a lift of pixels onto latents is what all others are"
        )
    if job.merge and job.moments_out is not None:
        raise UsageError("--merge fits on moments; --moments-out gathers them: give one of the two")
    if job.options.num_images == "auto" and (job.part is not None or Processes.expected() > 1):
        raise UsageError("--num-images auto cannot be shared: parts do not see each other; give a number")
    check_file(job.output or job.moments_out, ENDING)
    part_of(job.part)
    if job.merge and not job.moments:
        raise UsageError("--merge: no moments given; name the .safetensors files that --moments-out wrote")
    if len(job.models) > 1 or (not job.models and not job.merge):
        found = f"found {', '.join(job.models)}" if job.models else "none was given"
        raise UsageError(f"give one model (a diffusers folder or a Hub id); {found}")
    if not job.models:
        if job.options.vae is not None:
            raise UsageError("--vae needs a model beside the moments: they hold no pictures")
        if job.options.kind == "jacobian":
            raise UsageError("--kind jacobian needs a model beside the moments: they do not hold its decoder")
        return job
    subject = inspect_model(job.models[0])
    if not job.merge or _needs_source(job):
        check_sources(job.options)
    options = choose(job.options, subject)
    numbers = subject.dim if options.space == "pixel" else subject.rank
    if isinstance(options.rank, int) and not 1 <= options.rank <= numbers:
        raise UsageError(f"--rank {options.rank}: {options.space} tokens of this model have {numbers} numbers")
    if not job.merge or _needs_source(job):
        note_images(subject, options)
    return replace(job, options=options, subject=subject)


def run(job: FitJob, observer: Observer) -> FitDone:
    """Carry out a prepared job.

    Raises:
        UsageError: if images, moments or options will not do.
    """
    if job.merge:
        with output_file(job.output, ENDING):
            return _run_merge(job, observer)
    return _run_pass(job, observer)


def _run_merge(job: FitJob, observer: Observer) -> FitDone:
    """Fit on the sum of moments; pictures and the Jacobian need a model with its images."""
    collection, latent_patch, first = merge(job.moments, job.options)
    # Moments know for which colors they were gathered: those that the model's own fit has.
    color: Any = job.options.color or first.get("color") or None
    options = replace(job.options, color=color)
    source = None
    if job.subject is not None and _needs_source(job):
        source = open_source(job.subject, options, observer)
        if first.get("identity") != Pass(source, color_names(options.color), latent_patch).identity():
            raise UsageError(
                "--merge: the moments are not of this model and these images; leave both out, or give their own"
            )
    lift = fit_collected(collection, options, latent_patch, source, observer)
    return _save(job, lift, FitDone(images=collection.any.total.images))


def _needs_source(job: FitJob) -> bool:
    """Whether a merge looks at images again: for pictures, or for the decoder."""
    return bool(job.options.images) or job.options.kind == "jacobian"


def _run_pass(job: FitJob, observer: Observer) -> FitDone:
    """One pass over images, or this machine's part of it, and the fit."""
    subject = job.subject
    assert subject is not None
    # Before any model is placed: each process of a launch has its own device.
    processes = Processes()
    part = part_of(job.part) if job.part else (processes.index, processes.count)
    target = job.output or job.moments_out
    assert target is not None
    # Beside the output, so that the same command finds it again.
    checkpoint = target.with_name(f".{target.name}.{part[0]}-of-{part[1]}.moments")
    with output_file(target if processes.main else None, ENDING), output_file(checkpoint, checkpoint.suffix):
        return _gather(job, subject, processes, part, checkpoint, observer)


def _gather(
    job: FitJob,
    subject: Subject,
    processes: Processes,
    part: tuple[int, int],
    checkpoint: Path,
    observer: Observer,
) -> FitDone:
    options = job.options
    source = open_source(subject, options, observer)
    collection = fit_pass(source, options, subject.latent_patch, part=part, checkpoint=checkpoint, observer=observer)
    done = FitDone(resumed=collection.resumed, tallies=[source.tally])
    if job.part is None:
        collection = processes.add(collection)
    done.images = collection.any.total.images
    if not processes.main:
        checkpoint.unlink(missing_ok=True)
        return done
    if job.moments_out is not None:
        identity = Pass(source, color_names(options.color), subject.latent_patch).identity()
        notes = {"part": job.part or "1/1", "identity": identity, "latent_patch": str(subject.latent_patch)}
        notes["color"] = options.color or ""
        write_folds(job.moments_out, collection.folds, notes)
        done = replace(done, moments=job.moments_out)
    else:
        done = _save(job, fit_collected(collection, options, subject.latent_patch, source, observer), done)
    checkpoint.unlink(missing_ok=True)
    return done


def _save(job: FitJob, lift: Lift, done: FitDone) -> FitDone:
    assert job.output is not None
    lift.save(job.output)
    return replace(done, lift=lift)


def part_of(text: str | None) -> tuple[int, int]:
    """``3/8`` as (2, 8): places from 0.

    Raises:
        UsageError: if it is no such share.
    """
    if text is None:
        return 0, 1
    first, _, second = text.partition("/")
    if not (first.isdigit() and second.isdigit() and 1 <= int(first) <= int(second)):
        raise UsageError(f"--part {text}: expected a share such as 3/8")
    return int(first) - 1, int(second)


def merge(paths: tuple[Path, ...], options: FitOptions) -> tuple[Collection, int, dict[str, str]]:
    """The sum of moments that several machines gathered, the latent patch that they are of, and what the first says of itself.

    Raises:
        UsageError: if files are missing, do not belong together, or lack the color space that is asked for.
    """
    total: dict[str, FoldedMoments] = {}
    parts: dict[str, Path] = {}
    first: dict[str, str] = {}
    for path in paths:
        folds, notes = read_folds(path)
        first = first or notes
        if notes.get("identity") != first.get("identity"):
            raise UsageError(f"{path}: not of the same model, images and color spaces as {paths[0]}")
        missing = set(color_names(options.color)) - folds.keys()
        if missing:
            raise UsageError(
                f"{path}: holds moments in {', '.join(sorted(folds))}, not in {', '.join(sorted(missing))}"
            )
        share = notes.get("part", "1/1")
        if share in parts:
            raise UsageError(f"{path}: part {share} was already given by {parts[share]}")
        parts[share] = path
        for name in color_names(options.color):
            try:
                total[name] = total[name] + folds[name] if name in total else folds[name]
            except ValueError as error:
                raise UsageError(f"{path}: does not go with {paths[0]} ({error})") from error
    _check_complete(parts)
    return Collection(total), int(first.get("latent_patch", "2")), first


def _check_complete(parts: dict[str, Path]) -> None:
    """Raise unless the parts make one whole."""
    wholes = {share.partition("/")[2] for share in parts}
    if len(wholes) > 1:
        raise UsageError(f"--merge: parts of different wholes: {', '.join(sorted(parts))}")
    count = int(next(iter(wholes)))
    absent = [f"{index}/{count}" for index in range(1, count + 1) if f"{index}/{count}" not in parts]
    if absent:
        more = f" and {len(absent) - 5} more" if len(absent) > 5 else ""
        raise UsageError(f"--merge: part {', '.join(absent[:5])}{more} is missing")
