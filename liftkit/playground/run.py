"""One click: a prompt, painted by every chosen model from the same noise, reported while it happens."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from liftkit import __version__
from liftkit.errors import LiftkitError, UsageError
from liftkit.evaluate.tied import pixel_noise
from liftkit.lift import Lift
from liftkit.models.sampling import Loaded, check_size, sample, set_noise
from liftkit.options import LAST_SEED, Guidance
from liftkit.playground.estimates import watched
from liftkit.playground.shelf import Shelf
from liftkit.report.pictures import grid
from liftkit.report.saving import slug, write_picture

MOST_SHOWN = 12
"""Denoised estimates that are kept of one picture, evenly over its steps: decoding latents takes time."""
LARGEST = 8192
"""Side of a picture in pixels."""
OPTIONAL = {"negative": "negative prompt", "guidance": "guidance", "clamp": "clamp"}
"""Choices that not every model has, in words."""


class Cancelled(Exception):
    """The run was asked to end."""


@dataclass(frozen=True)
class Request:
    """What to paint. None leaves a choice to each pipeline.

    Args:
        prompt: what the picture should show.
        negative: what it should not show; empty for nothing.
        seed: of the noise.
        height, width: in pixels.
        steps: of the sampler.
        guidance: its scale.
        clamp: keep the denoised estimate within sRGB.

    Raises:
        UsageError: naming a number that is none, or out of range.
    """

    prompt: str
    negative: str = ""
    seed: int = 0
    height: int | None = None
    width: int | None = None
    steps: int | None = None
    guidance: float | None = None
    clamp: bool | None = None

    def __post_init__(self) -> None:
        for name, low, high in (
            ("seed", 0, LAST_SEED), ("height", 1, LARGEST), ("width", 1, LARGEST), ("steps", 1, 10_000),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is None and name != "seed":
                continue
            if not isinstance(value, int | float) or not float(value).is_integer() or not low <= value <= high:
                raise UsageError(f"{name}: expected a whole number from {low} to {high}, got {value}")
            object.__setattr__(self, name, int(value))


@dataclass(frozen=True)
class Step:
    """A step of a model's sampler.

    Args:
        model: its label.
        index: of the step, from 0.
        sigma: noise level of the model's state, in [0, 1].
        estimate: file of the picture that the model expects to arrive at; None for steps that are not shown.
    """

    model: str
    index: int
    sigma: float
    estimate: Path | None


@dataclass(frozen=True)
class Painted:
    """A finished picture.

    Args:
        model: its label.
        file: a PNG with its settings inside, see :func:`liftkit.report.saving.read_settings`.
        steps: that were shown, in order.
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


Observe = Callable[[str, int, int, Step | None], None]
"""Called with a model's label, the steps that are done, their number, and the last of them; before the first, while the model is
loaded, with None. What it raises ends the run."""


def paint(shelf: Shelf, request: Request, chosen: Sequence[str], folder: Path, observe: Observe) -> Iterator[Painted]:
    """Pictures of the chosen models, in the shelf's order, each as it is ready.

    Args:
        shelf: the models.
        request: what to paint.
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
        observe(label, 0, request.steps or shelf.abilities[label].steps, None)
        with _memory(label, shelf.device):
            model = shelf.take(label, order)
            painted = _paint(shelf, model, request, order, label, folder / str(number), observe)
        yield painted


def _paint(
    shelf: Shelf, model: Loaded, request: Request, chosen: Sequence[str], label: str, folder: Path, observe: Observe
) -> Painted:
    """One model's picture."""
    can, asked = shelf.abilities[label], request
    request = replace(
        asked,
        height=asked.height or model.size,
        width=asked.width or model.size,
        steps=asked.steps or can.steps,
        negative=asked.negative if can.negative else "",
        guidance=asked.guidance if can.guidance else None,
        clamp=asked.clamp if can.clamp else None,
    )
    assert request.height is not None
    assert request.width is not None
    check_size(model, request.height, request.width)
    tie = None if model.flow.is_pixel else shelf.tie(label, chosen)
    folder.mkdir(parents=True, exist_ok=True)
    steps = _Steps(label, request.steps or 1, folder, observe)
    begun, scheduler = time.perf_counter(), model.pipeline.scheduler
    try:
        if can.clamp:
            set_noise(model, None, request.clamp)
        with watched(model, steps, request.height, request.width):
            images = sample(
                model,
                [request.prompt],
                noise=_noise(model, request, tie),
                seed=request.seed,
                height=request.height,
                width=request.width,
                steps=request.steps,
                guidance=Guidance(request.guidance),
                negative=request.negative or None,
            )
    finally:
        model.pipeline.scheduler = scheduler
    seconds = time.perf_counter() - begun
    settings = _settings(shelf, label, request, None if tie is None else tie[0])
    file = folder / f"{request.seed:06d}-{slug(request.prompt)}-{slug(label)}.png"
    write_picture(grid(images, 1), file, settings)
    left_out = [words for name, words in OPTIONAL.items() if getattr(asked, name) and not getattr(request, name)]
    return Painted(label, file, tuple(steps.shown), seconds, settings, tuple(left_out))


class _Steps:
    """Reports a sampler's steps, and keeps the estimates of some of them as files.

    Args:
        label: of the model.
        count: of the steps.
        folder: for the files.
        observe: see :data:`Observe`.
    """

    def __init__(self, label: str, count: int, folder: Path, observe: Observe) -> None:
        self.label, self.count, self.folder, self.observe = label, count, folder, observe
        self.done, self.shown = 0, list[Step]()
        most = min(count, MOST_SHOWN)
        self.kept = {round(index * (count - 1) / max(most - 1, 1)) for index in range(most)}

    def __call__(self, sigma: float, estimate: Callable[[], Tensor]) -> None:
        """A step is taken."""
        file = self.folder / f"step-{self.done + 1:04d}.png" if self.done in self.kept else None
        step = Step(self.label, self.done, sigma, file)
        if file is not None:
            grid(estimate(), 1).save(file)
            self.shown.append(step)
        self.done += 1
        self.observe(self.label, min(self.done, self.count), self.count, step)


def _noise(model: Loaded, request: Request, tie: tuple[str, Lift] | None) -> Tensor | None:
    """That of pixels, which a tie carries to a latent model's; None for a latent model without one, which draws its own."""
    if not model.flow.is_pixel and tie is None:
        return None
    assert request.height is not None
    assert request.width is not None
    noise = pixel_noise([0], request.height, request.width, request.seed)
    return noise if tie is None else tie[1].lower(noise)


def _settings(shelf: Shelf, label: str, request: Request, tie: str | None) -> dict[str, Any]:
    """What made a picture, under the names that ``liftkit sample`` gives."""
    chosen = asdict(request)
    entry = shelf.entries[label]
    return {
        "model": entry.folder.name if entry.source == entry.folder.source else entry.source,
        "prompt": chosen.pop("prompt"),
        "guidance": shelf.abilities[label].scale if request.guidance is None else chosen.pop("guidance"),
        "liftkit": __version__,
        **{name: value for name, value in chosen.items() if value not in (None, "")},
        **({} if tie is None else {"noise": f"of pixels, carried to latents by {tie}"}),
    }


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
