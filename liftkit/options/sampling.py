"""Choices of whatever samples images: guidance, the sampler, pictures to begin from."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from liftkit.errors import UsageError
from liftkit.options.option import LAST_SEED, Device, Option

STRENGTH = 0.6
"""Of a start image."""
Solver = Literal["euler", "heun", "sde", "unipc"]
Offload = Literal["none", "model", "group"]
Benchmark = Literal["geneval", "dpg", "hpsv3", "coco"]


@dataclass(frozen=True)
class Guidance:
    """How samples are guided; :func:`liftkit.guided` applies it to a stock pipeline.

    Raises:
        UsageError: if the scale is not finite, or two ends are no interval in [0, 1].
    """

    scale: Annotated[
        float | None,
        Option("Guidance scale; at 1 and below there is no guidance.", flags=("--guidance",), default="the pipeline's"),
    ] = None
    start: Annotated[float, Option("Fraction of the steps after which guidance starts.", min=0.0, max=1.0)] = 0.0
    stop: Annotated[float, Option("Fraction of the steps after which guidance stops.", min=0.0, max=1.0)] = 1.0
    low: Annotated[
        float,
        Option(
            "Lowest noise level at which there is guidance, as the network is given it: a converted model's is the latent "
            "model's.",
            min=0.0,
            max=1.0,
        ),
    ] = 0.0
    high: Annotated[float, Option("Highest noise level at which there is guidance.", min=0.0, max=1.0)] = 1.0
    orthogonal: Annotated[
        float | None,
        Option(
            "How much of the part of guidance along the denoised estimate is left out, which only raises contrast: 1 is all.",
            min=0.0,
            max=1.0,
            default="the scheduler's: 1 for an imported AsymFLUX.2, else 0",
        ),
    ] = None

    def __post_init__(self) -> None:
        if self.scale is not None and not math.isfinite(self.scale):
            raise UsageError(f"--guidance {self.scale}: expected a finite number")
        for below, above, what in (("start", "stop", "of the steps"), ("low", "high", "in noise levels")):
            first, last = getattr(self, below), getattr(self, above)
            if not 0.0 <= first <= last <= 1.0:
                raise UsageError(
                    f"guidance from {first:g} to {last:g} {what}: no interval in 0 to 1; --guidance-{below} may not be above "
                    f"--guidance-{above}"
                )
        if self.orthogonal is not None and not 0.0 <= self.orthogonal <= 1.0:
            raise UsageError(f"--guidance-orthogonal {self.orthogonal:g}: expected a number from 0 to 1")

    @property
    def record(self) -> Any:
        """As plain data; the scale alone where nothing else was chosen."""
        return self.scale if self == Guidance(self.scale) else {"scale": self.scale, **chosen(self)}


def chosen(options: Any) -> dict[str, Any]:
    """The fields of an options object that are not their defaults."""
    return {each.name: value for each in fields(options) if (value := getattr(options, each.name)) != each.default}


@dataclass(frozen=True)
class Sampler:
    """How the way from noise to image is walked, where it is not as the model's own scheduler says.

    Raises:
        UsageError: if a field says something about another that is not given, or is no number that makes sense.
    """

    solver: Annotated[
        Solver | None,
        Option(
            "Method of the steps. `heun` evaluates the network twice in all steps but the last; `sde` adds fresh noise; "
            "`unipc` remembers earlier steps.",
            flags=("--solver",),
            default="the scheduler's",
        ),
    ] = None
    eta: Annotated[
        float | None,
        Option(
            "Strength of the fresh noise of --solver sde: 0 is Euler's method, 1 renews all that it can.",
            flags=("--eta",),
            min=0.0,
            max=1.0,
            default="1",
        ),
    ] = None
    shift: Annotated[
        float | None,
        Option(
            "Shift of the noise levels, in the model's own space.",
            flags=("--shift",),
            min=0.01,
            default="the scheduler's",
        ),
    ] = None
    shift_side: Annotated[
        int | None,
        Option(
            "Side of the square images that --shift is for; for others it grows with the square root of the pixel count.",
            flags=("--shift-side",),
            min=1,
            default="one shift for all sizes",
        ),
    ] = None
    clamp: Annotated[
        bool | None,
        Option(
            "Keep the denoised estimate of a pixel model within the colors of sRGB at every step.",
            flags=("--clamp/--no-clamp",),
            default="the scheduler's",
        ),
    ] = None
    sigma_floor: Annotated[
        float | None,
        Option(
            "Lowest noise level by which a pixel model divides when it recovers the velocity.",
            flags=("--sigma-floor",),
            min=0.0,
            max=1.0,
            default="the model's",
        ),
    ] = None

    def __post_init__(self) -> None:
        if self.eta is not None and self.solver != "sde":
            raise UsageError(f"--eta {self.eta:g}: only --solver sde adds noise; give that, or leave --eta out")
        if self.shift_side is not None and self.shift is None:
            raise UsageError(f"--shift-side {self.shift_side}: goes with --shift; give both")
        for flag, number in (("--shift", self.shift), ("--sigma-floor", self.sigma_floor)):
            if number is not None and not (math.isfinite(number) and number > 0):
                raise UsageError(f"{flag} {number:g}: expected a number above 0")

    def shift_for(self, height: int, width: int) -> float | None:
        """The shift of the noise levels for images of a size in pixels; None leaves it to the scheduler."""
        if self.shift is None or self.shift_side is None:
            return self.shift
        return self.shift * math.sqrt(height * width) / self.shift_side


@dataclass(frozen=True)
class Pictures:
    """What sampling begins from, and what it looks at.

    Raises:
        UsageError: if the strength is not in (0, 1], or there is no picture that it is of.
    """

    image: Annotated[
        Path | None,
        Option("Picture to start from instead of noise alone.", "FILE", ("--image",), default="none", names="file"),
    ] = None
    strength: Annotated[
        float | None,
        Option(
            "Share of the steps that are taken from --image, noised as far: 1 forgets it, little keeps it.",
            flags=("--strength",),
            default=f"{STRENGTH:g}",
        ),
    ] = None
    references: Annotated[
        tuple[Path, ...],
        Option(
            "Pictures that the model edits or takes up, for models that can: one or several files, or the option again.",
            "FILE...",
            ("--reference",),
            default="none",
            names="file",
        ),
    ] = ()

    def __post_init__(self) -> None:
        if self.strength is None:
            return
        if self.image is None:
            raise UsageError(f"--strength {self.strength:g}: goes with --image; give both")
        if not 0.0 < self.strength <= 1.0:
            raise UsageError(f"--strength {self.strength:g}: expected a number above 0, at most 1")

    @property
    def record(self) -> dict[str, Any]:
        """As plain data, without what was left out."""
        start = {} if self.image is None else {"image": str(self.image), "strength": self.strength or STRENGTH}
        return start | ({"references": [str(path) for path in self.references]} if self.references else {})


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """Choices of whatever samples images."""

    seed: Annotated[
        int,
        Option("Seed of the first image; image i starts from seed + i, whatever the batch size.", min=0, max=LAST_SEED),
    ] = 0
    steps: Annotated[int | None, Option("Number of denoising steps.", min=1, max=10_000, default="the pipeline's")] = (
        None
    )
    guidance: Guidance = Guidance()
    negative: Annotated[str | None, Option("What no image should show.", default="the empty prompt")] = None
    sampler: Sampler = Sampler()
    pictures: Pictures = Pictures()
    adapter: Annotated[
        str | None,
        Option(
            "Adapter to apply: a folder of liftkit finetune with save: adapter, or of the AsymFlow authors.",
            "FOLDER",
            default="none",
            names="model",
        ),
    ] = None
    height: Annotated[
        int | None,
        Option(
            "Height of the images in pixels.",
            min=1,
            max=65_536,
            default="the autoencoder's, in the shape of a picture that is given",
        ),
    ] = None
    width: Annotated[
        int | None,
        Option(
            "Width of the images in pixels.",
            min=1,
            max=65_536,
            default="the autoencoder's, in the shape of a picture that is given",
        ),
    ] = None
    device: Device = "auto"
    offload: Annotated[
        Offload,
        Option(
            "What waits in host memory and comes to the GPU when it runs: `model`, text encoder, transformer and VAE in their "
            "turn; `group`, each layer, slower and in the least memory."
        ),
    ] = "none"
    batch_size: Annotated[int, Option("Number of images that are sampled at once.", min=1)] = 8

    @property
    def record(self) -> dict[str, Any]:
        """What decides how an image looks beside model, prompt and seed, as plain data; without what was left out."""
        how = {
            "guidance": self.guidance.record,
            "negative": self.negative,
            **chosen(self.sampler),
            **self.pictures.record,
        }
        return {name: value for name, value in how.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(SampleOptions):
    """Choices of ``liftkit generate``."""

    count: Annotated[
        int | None,
        Option(
            "Number of images in the finished folder.",
            flags=("--count", "-n"),
            min=1,
            max=10**9,
            default="all that --layout asks for; needed without one",
        ),
    ] = None
    layout: Annotated[
        Benchmark | None,
        Option(
            "Benchmark whose names, folders and grids the output has; --prompts is then the benchmark's own file or folder.",
            default="a plain dataset folder",
        ),
    ] = None
