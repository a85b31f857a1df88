"""A comparison before anything is loaded: its models found, its options checked and completed."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from liftkit import embedded
from liftkit.checkpoint.record import BEGUN, read_record
from liftkit.device import choose_device
from liftkit.errors import UsageError
from liftkit.evaluate.cache import tensor_digest
from liftkit.evaluate.entries import Entry, labels, open_entry, open_latent, open_pixel
from liftkit.evaluate.figures import ENOUGH
from liftkit.evaluate.metrics import Chosen, choose
from liftkit.fit.subject import Subject, inspect_model
from liftkit.lift import Lift
from liftkit.options import CompareOptions

QUICK = 64
"""Samples of ``--quick``."""


@dataclass(frozen=True)
class Work:
    """A comparison that was checked.

    Args:
        options: with their automatic choices made.
        subject: the base, with its VAE.
        base: the same as an entry.
        pixels: pixel models by label, in order.
        controls: those of the optional controls that were given, by key.
        lift: of the first pixel model; ties the noise of latent models.
        count: n, samples of each model.
        size: side of the images.
        notes: what a reader has to know.
        metrics: published figures that were asked for.
    """

    options: CompareOptions
    subject: Subject
    base: Entry
    pixels: dict[str, Entry]
    controls: dict[str, Entry]
    lift: Lift
    count: int
    size: int
    notes: list[str]
    metrics: Chosen

    def steps(self, which: int) -> int | None:
        """Sampling steps of the base (0) or of a pixel model (from 1); None for the pipeline's own."""
        given = self.options.steps
        return None if not given else given[0] if len(given) == 1 else given[which]


def prepare(options: CompareOptions) -> Work:
    """Check everything that can be checked without loading a model.

    Raises:
        UsageError: naming the flag or the folder.
    """
    count = _count(options)
    metrics = choose([name.strip() for name in options.metrics.split(",") if name.strip()], count)
    options = _resolved(options)
    base = open_latent(options.base)
    subject = inspect_model(options.base)
    pixels = [open_pixel(name, options.base) for name in options.pixels]
    names = labels([entry for entry, _ in pixels], options.labels)
    controls = _controls(options)
    for entry in (*(entry for entry, _ in pixels), *controls.values()):
        _check_geometry(entry, subject)
    lift = next((each for entry, each in pixels if not _from_nothing(entry)), None) or _untied(subject)
    size = options.resolution or base.size
    if size % lift.patch_size:
        raise UsageError(f"--resolution {size}: not a multiple of the {lift.patch_size} pixels of one token")
    notes = []
    converted = [(name, each) for name, (entry, each) in zip(names, pixels) if not _from_nothing(entry)]
    if len({tensor_digest(each.basis) for _, each in converted}) > 1:
        notes.append(
            f"The pixel models have different lifts; latent models start from the noise of {converted[0][0]}'s."
        )
    if len(converted) < len(pixels):
        notes.append("Models that were made from nothing have no latent model whose noise could be theirs too.")
    if options.quick:
        notes.append(
            f"A quick look at {count} samples with a shorter two-sample test: its figures are not those of a whole run."
        )
    entries = dict(zip(names, (entry for entry, _ in pixels)))
    return Work(options, subject, base, entries, controls, lift, count, size, notes, metrics)


def _count(options: CompareOptions) -> int:
    count = options.count or (QUICK if options.quick else ENOUGH)
    if count < ENOUGH and not options.quick:
        raise UsageError(
            f"-n {count}: Frechet distances of fewer than {ENOUGH} samples say more of their number than of the model; "
            "take more, or pass --quick to go without them"
        )
    return count


def _resolved(options: CompareOptions) -> CompareOptions:
    """The automatic choices, and what follows from the options alone."""
    if not options.pixels:
        raise UsageError("no pixel model to compare; give at least one converted folder")
    if len(options.steps) not in (0, 1, 1 + len(options.pixels)):
        raise UsageError(
            f"--steps: {len(options.steps)} given; give one for all models, or {1 + len(options.pixels)}, for the base "
            "and each pixel model in order"
        )
    if options.cache is not None and options.cache.exists() and not options.cache.is_dir():
        raise UsageError(f"--cache {options.cache}: is a file; give a folder")
    device, _ = choose_device(options.device)
    at_demo = options.real == "demo"
    steps = options.steps or ((embedded.STEPS,) if at_demo else ())
    guidance = options.guidance
    if guidance.scale is None and at_demo:
        guidance = replace(guidance, scale=embedded.GUIDANCE)
    return replace(options, steps=steps, guidance=guidance, device=device)


def _controls(options: CompareOptions) -> dict[str, Entry]:
    found = {}
    if options.continued is not None:
        found["continued"] = open_latent(options.continued, "--continued", options.base)
    if options.scratch is not None:
        found["scratch"] = open_entry(options.scratch, options.base)
    return found


def _from_nothing(entry: Entry) -> bool:
    """True for a model that no latent one was converted to."""
    return bool(read_record(entry.folder.path).get("format") == BEGUN)


def _untied(subject: Subject) -> Lift:
    """A lift that stands for nothing, where all pixel models were made from nothing: it draws the base's noise, as good as any."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(subject.dim, subject.rank, generator=generator, dtype=torch.float64))[0]
    return Lift(basis, 1.0, subject.side, subject.latent_patch)


def _check_geometry(entry: Entry, subject: Subject) -> None:
    if entry.lift is None or _from_nothing(entry):
        return
    own, base = (entry.lift.rank, entry.lift.patch_size), (subject.rank, subject.side)
    if own != base:
        raise UsageError(
            f"{entry.source}: its tokens hold {own[0]} latent numbers and {own[1]} x {own[1]} pixels, the base's "
            f"{base[0]} and {base[1]} x {base[1]}; compare a pixel model with its own base"
        )
