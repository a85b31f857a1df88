"""One click: a prompt, painted by every chosen model from the same noise, reported while it happens."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from liftkit.errors import LiftkitError, UsageError
from liftkit.evaluate.tied import pixel_noise
from liftkit.lift import Lift
from liftkit.models.editing import check_pictures, size_for
from liftkit.models.loaded import Loaded
from liftkit.models.sampling import check_options, sample, walked
from liftkit.options import Guidance, Pictures, SampleOptions, Sampler
from liftkit.playground.abilities import Abilities
from liftkit.playground.estimates import At, watched
from liftkit.playground.shelf import Shelf
from liftkit.report.pictures import grid
from liftkit.report.saving import slug, write_picture

MOST_SHOWN = 12
"""Denoised estimates that are kept of one picture, evenly over its steps: decoding latents takes time."""


class Cancelled(Exception):
    """The run was asked to end."""


@dataclass(frozen=True)
class Step:
    """A step of a model's sampler.

    Args:
        model: its label.
        at: which step.
        estimate: file of the picture that the model expects to arrive at; None for steps that are not shown.
    """

    model: str
    at: At
    estimate: Path | None


@dataclass(frozen=True)
class Painted:
    """A finished picture.

    Args:
        model: its label.
        file: a PNG with its settings inside, see :func:`liftkit.report.saving.read_settings`.
        steps: that are shown, in order.
        seconds: that sampling took.
        settings: what made it.
        left_out: choices that do not apply to the model.
    """

    model: str
    file: Path
    steps: tuple[Step, ...]
    seconds: float
    settings: dict[str, Any]
    left_out: tuple[str, ...]


Observe = Callable[[str, Step | None], None]
"""Called with a model's label and each step that it takes; before it is loaded, with None. What it raises ends the run."""


def paint(
    shelf: Shelf, prompt: str, options: SampleOptions, chosen: Sequence[str], folder: Path, observe: Observe
) -> Iterator[Painted]:
    """Pictures of the chosen models, in the shelf's order, each as it is ready.

    Args:
        shelf: the models.
        prompt: what the pictures should show.
        options: how they are sampled. What a model cannot do is left out for it; the device is the shelf's.
        chosen: labels.
        folder: for the files.
        observe: see :data:`Observe`.

    Raises:
        UsageError: if nothing is chosen, or what is asked for does not go with a model.
        LiftkitError: if a model does not fit into memory.
    """
    order = [label for label in shelf.labels if label in chosen]
    if not order:
        raise UsageError("no model is chosen; choose at least one")
    for number, label in enumerate(order):
        check_pictures(shelf.entries[label].folder, _fitting(options, shelf.abilities[label]).pictures)
        observe(label, None)
        with _memory(label, shelf.device):
            model = shelf.take(label, order)
            painted = _paint(shelf, model, prompt, options, order, label, folder / str(number), observe)
        yield painted


def _paint(
    shelf: Shelf,
    model: Loaded,
    prompt: str,
    asked: SampleOptions,
    chosen: Sequence[str],
    label: str,
    folder: Path,
    observe: Observe,
) -> Painted:
    """One model's picture."""
    options = _fitting(asked, shelf.abilities[label])
    check_options(model, options)
    height, width = size_for(options, model.size, model.multiple)
    tie = None if model.flow.is_pixel else shelf.tie(label, chosen)
    settings = {
        **_origin(shelf, label),
        "prompt": prompt,
        "seed": options.seed,
        **model.settings(options, height, width),
        **_names(options.pictures),
        **({} if tie is None else {"noise": f"of pixels, carried to latents by {tie[0]}"}),
    }
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{options.seed:06d}-{slug(prompt)}-{slug(label)}.png"
    steps, begun = _Steps(label, file, settings, observe), time.perf_counter()
    # What is watched is the scheduler that solver and start image make, once.
    rest = replace(
        options,
        height=height,
        width=width,
        sampler=Sampler(),
        pictures=Pictures(references=options.pictures.references),
    )
    with walked(model, options, height, width), watched(model, steps, height, width):
        images = sample(model, [prompt], rest, noise=_noise(model, height, width, options.seed, tie))
    write_picture(grid(images, 1), file, settings)
    seconds, left_out = time.perf_counter() - begun, _left_out(asked, options)
    return Painted(label, file, tuple(steps.shown), seconds, settings, left_out)


class _Steps:
    """Reports a sampler's steps, and keeps the estimates of some of them as files.

    Args:
        label: of the model.
        finished: file of the finished picture; the estimates lie beside it.
        settings: what makes it, which the estimates keep too, with their step.
        observe: see :data:`Observe`.
    """

    def __init__(self, label: str, finished: Path, settings: dict[str, Any], observe: Observe) -> None:
        self.label, self.finished, self.settings, self.observe = label, finished, settings, observe
        self.shown: list[Step] = []

    def __call__(self, at: At, estimate: Callable[[], Tensor]) -> None:
        """A step is taken."""
        most = min(at.count, MOST_SHOWN)
        kept = {round(number * (at.count - 1) / max(most - 1, 1)) for number in range(most)}
        number = at.index + 1
        file = self.finished.with_stem(f"{self.finished.stem}-step-{number:04d}") if at.index in kept else None
        step = Step(self.label, at, file)
        if file is not None:
            write_picture(grid(estimate(), 1), file, {**self.settings, "estimate_after_step": number})
            self.shown.append(step)
        self.observe(self.label, step)


def _fitting(asked: SampleOptions, can: Abilities) -> SampleOptions:
    """The options without what a model cannot do."""
    return replace(
        asked,
        negative=asked.negative if can.negative else None,
        guidance=asked.guidance if can.guidance else Guidance(),
        sampler=asked.sampler if can.clamp else replace(asked.sampler, clamp=None),
        pictures=asked.pictures if can.references else replace(asked.pictures, references=()),
    )


def _left_out(asked: SampleOptions, options: SampleOptions) -> tuple[str, ...]:
    """The choices that :func:`_fitting` left out, in words."""
    gone = {
        "negative prompt": asked.negative and not options.negative,
        "guidance": asked.guidance != options.guidance,
        "clamp": asked.sampler.clamp and not options.sampler.clamp,
        "reference images": asked.pictures.references != options.pictures.references,
    }
    return tuple(name for name, is_gone in gone.items() if is_gone)


def _noise(model: Loaded, height: int, width: int, seed: int, tie: tuple[str, Lift] | None) -> Tensor | None:
    """That of pixels, which a tie carries to a latent model's; None for a latent model without one, which draws its own."""
    if not model.flow.is_pixel and tie is None:
        return None
    noise = pixel_noise([0], height, width, seed)
    return noise if tie is None else tie[1].lower(noise)


def _names(pictures: Pictures) -> dict[str, Any]:
    """The files of pictures without the folder that they were uploaded to."""
    image = {} if pictures.image is None else {"image": pictures.image.name}
    references = {} if not pictures.references else {"references": [path.name for path in pictures.references]}
    return {**image, **references}


def _origin(shelf: Shelf, label: str) -> dict[str, Any]:
    """The model, and its adapter if it has one, as ``liftkit sample`` records them."""
    entry = shelf.entries[label]
    return {"model": entry.folder.name, "adapter": None if entry.source == entry.folder.source else entry.source}


@contextmanager
def _memory(label: str, device: str) -> Iterator[None]:
    """A lack of memory, in words."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise LiftkitError(
            f"{label}: no memory left on {device}; take a smaller picture, or one model at a time"
        ) from error
