"""Pixel models beside their latent base and beside every control, scored alike: what ``liftkit compare`` does."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from liftkit.checkpoint.leftovers import sweep
from liftkit.checkpoint.lock import claimed
from liftkit.color import to_signed, to_uint8
from liftkit.data.cache import TensorCache, held_cache
from liftkit.evaluate.cache import digest, remembered, tensor_digest
from liftkit.evaluate.comparison import Comparison, Role, Row
from liftkit.evaluate.controls import AMOUNTS, TRIAL_STEPS, Choice, choose, filtered
from liftkit.evaluate.entries import Entry
from liftkit.evaluate.figures import ENOUGH, FIGURES, SEEDS, STEPS, Score, Scorer
from liftkit.evaluate.metrics import described, measure
from liftkit.evaluate.plan import Work, prepare
from liftkit.evaluate.real import Real, open_real
from liftkit.evaluate.tied import Settings, tied_samples
from liftkit.evaluate.verdict import Verdict, judge
from liftkit.fit.source import open_latents
from liftkit.options import CompareOptions
from liftkit.progress import Observer, Silent

SHOWN = 8
QUICK_STEPS, QUICK_SEEDS = 50, (0,)
DEFINITIONS = 1
"""Raised when a figure's definition changes, so that no kept score of an older one is taken."""
OPTIONAL = {"continued": "latent base, continued", "scratch": "network from random weights"}
FILTERED = {"unsharp": "base + unsharp mask", "noise": "base + white noise"}
Set = tuple[Row, Tensor | None]


def compare(options: CompareOptions, observer: Observer | None = None) -> Comparison:
    """Sample every model from tied noise, make the controls, score all rows, and judge.

    Raises:
        UsageError: if models, images or options do not fit together; then nothing was sampled.
    """
    return execute(prepare(options), observer or Silent())


def execute(work: Work, observer: Observer) -> Comparison:
    """Do what was planned; see :func:`compare`."""
    options = work.options
    for line in work.metrics.missing.values():
        observer.note(line)
    with _cache(options.cache, observer.note) as cache:
        real = open_real(options.real, work.count, work.size, options.seed, options.prompts)
        sets = _sets(work, real, cache, observer)
        rows = _measured(work, real, sets, _scored(work, real, sets, cache, observer), cache, observer)
    return Comparison(
        rows=rows,
        verdicts=_verdicts(rows, work.count),
        prompts=list(real.prompts[:SHOWN]),
        count=work.count,
        real=real.description,
        notes=[*work.notes, *_notes(work, real)],
        settings=_settings(options),
        metrics=described(work.metrics, work.count, len(real.reference)),
    )


@contextmanager
def _cache(folder: Path | None, note: Callable[[str], None]) -> Iterator[Path]:
    """The folder of ``--cache``, held, or one for this run alone."""
    if folder is None:
        place = Path(tempfile.gettempdir()) / "liftkit-compare"
        sweep(place)
        with claimed(place) as temporary:
            yield temporary
        return
    with held_cache(folder, note):
        yield folder


def _sets(work: Work, real: Real, cache: Path, observer: Observer) -> list[Set]:
    """Every row with its images, uint8 (n, 3, S, S); None for a control that was not given."""
    options = work.options
    settings = Settings(
        real.prompts,
        work.size,
        options.seed,
        options.guidance,
        options.solver,
        options.device,
        options.batch_size,
        cache,
    )

    def painted(entry: Entry, key: str, label: str, role: Role, which: int) -> tuple[Row, Tensor]:
        steps = work.steps(which)
        images = tied_samples(entry, work.lift, steps, settings, observer, label)
        return Row(key, label, role, detail={"source": entry.source, "digest": entry.digest, "steps": steps}), images

    base = painted(work.base, "base", "latent base", "control", 0)
    optional: list[Set] = []
    for key, label in OPTIONAL.items():
        entry = work.controls.get(key)
        # A network from random weights is sampled as the pixel model that it is the control of.
        which = 1 if key == "scratch" else 0
        optional.append(painted(entry, key, label, "control", which) if entry else (Row(key, label, "control"), None))
    pixels = [
        painted(entry, f"pixel-{index}", label, "pixel", index)
        for index, (label, entry) in enumerate(work.pixels.items(), start=1)
    ]
    return [
        (Row("real", "real images", "real"), real.shown),
        (Row("vae", "real through the VAE", "control"), _through_vae(work, real, cache, observer)),
        base,
        *_filtered(work, base[1], real, cache, observer),
        *optional,
        *pixels,
    ]


def _through_vae(work: Work, real: Real, cache: Path, observer: Observer) -> Tensor:
    kept = TensorCache(cache / "samples", digest({"vae": work.base.digest, "images": tensor_digest(real.shown)}))
    if "images" not in kept:
        options = work.options
        space = open_latents(work.subject, options.device)
        parts = []
        with observer.stage("control: real images through the VAE", len(real.shown), "images") as advance:
            for part in real.shown.split(options.batch_size):
                latents = space.encode(to_signed(part).to(options.device))
                parts.append(to_uint8(space.decode(latents)).cpu())
                advance(len(part))
        kept.add({"images": {"image": torch.cat(parts)}})
        kept.flush()
    return kept.get("images")["image"]


def _filtered(work: Work, base: Tensor, real: Real, cache: Path, observer: Observer) -> list[Set]:
    """The base with the best of each filter."""
    half, steps = base[: len(base) // 2], 0 if work.options.quick else TRIAL_STEPS
    origin = {"validation": tensor_digest(real.shown), "steps": steps, "definitions": DEFINITIONS}
    result: list[Set] = []
    with observer.stage("control: the best filters", len(AMOUNTS), "filters") as advance:
        for name, amounts in AMOUNTS.items():
            key = {**origin, "filter": name, "amounts": amounts, "images": tensor_digest(half)}
            make = partial(choose, name, half, real.shown, steps)
            chosen = remembered(cache, key, Choice, make)
            row = Row(name, f"{FILTERED[name]} {chosen.amount:g}", "control", detail=asdict(chosen))
            result.append((row, filtered(name, base, chosen.amount)))
            advance(1)
    return result


def _scored(work: Work, real: Real, sets: list[Set], cache: Path, observer: Observer) -> list[Row]:
    """The rows with their scores; those that a cache holds are not taken again."""
    steps, seeds = (QUICK_STEPS, QUICK_SEEDS) if work.options.quick else (STEPS, SEEDS)
    scorer = Scorer(real.reference, patch=work.lift.patch_size, scenes=real.scenes, steps=steps, seeds=seeds)
    origin = {
        "reference": tensor_digest(real.reference),
        "patch": work.lift.patch_size,
        "prompts": real.prompts if real.scenes else None,
        "steps": steps,
        "seeds": seeds,
        "definitions": DEFINITIONS,
    }
    rows = []
    with observer.stage("score", len(sets), "rows") as advance:
        for row, images in sets:
            if images is not None:
                key = {**origin, "images": tensor_digest(images)}
                score = remembered(cache, key, Score, partial(scorer.score, images))
                row = replace(row, score=score, images=images[:SHOWN])
            rows.append(row)
            advance(1)
    return rows


def _measured(work: Work, real: Real, sets: list[Set], rows: list[Row], cache: Path, observer: Observer) -> list[Row]:
    """The rows with the published figures that were asked for."""
    images = {row.key: each for row, each in sets if each is not None}
    found = measure(work.metrics, images, real.reference, real.prompts, cache, work.options.device, observer)
    complete = []
    for row in rows:
        if row.score is not None:
            figures = {**dict.fromkeys(FIGURES), **row.score.figures, **found[row.key]}
            row = replace(row, score=replace(row.score, figures=figures))
        complete.append(row)
    return complete


def _verdicts(rows: list[Row], count: int) -> list[Verdict]:
    """One for each pixel model."""
    controls = [row for row in rows if row.role == "control"]
    given = {row.key: row.score.figures for row in controls if row.score is not None}
    labels = {row.key: row.label for row in controls}
    return [
        judge(row.key, row.label, row.score.figures, given, labels, count)
        for row in rows
        if row.role == "pixel" and row.score is not None
    ]


def _notes(work: Work, real: Real) -> list[str]:
    notes = []
    if work.count < ENOUGH:
        notes.append(f"Frechet distances are left out: {ENOUGH} samples are needed for them.")
    if work.options.prompts is not None:
        notes.append(
            "The prompts are not the real images' own captions: the real rows show other things than the models'."
        )
    if real.silent:
        notes.append(
            f"Real images without a caption: {len(real.silent)} of the {work.count} that give the prompts, such as "
            f"{real.silent[0]}. Their prompt is empty."
        )
    if real.scenes is None:
        notes.append("The prompts are not the demo data's, so that its oracle's figures do not apply.")
    return [*notes, *(f"Real images: {summary}." for tally in real.tallies if (summary := tally.summary()))]


def _settings(options: CompareOptions) -> dict[str, Any]:
    """The options as plain data, without what changes no figure."""
    plain = asdict(replace(options, cache=None, prompts=None))
    return {**plain, "prompts": options.prompts.name if options.prompts else None}
