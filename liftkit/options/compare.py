"""Choices of a comparison."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from liftkit.options.option import LAST_SEED, Argument, Device, Option
from liftkit.options.sampling import Guidance


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """Choices of a comparison."""

    base: Annotated[str, Argument("Latent model: a folder, a Hub id, or `demo`.", "MODEL", names="model")]
    pixels: Annotated[tuple[str, ...], Argument("Pixel models: one or more converted folders.", "PIXEL", names="model")]
    real: Annotated[
        str,
        Option(
            "Folder of real images, or `demo` for the embedded ones; an image without a caption takes the empty prompt.",
            "FOLDER",
            names="folder",
        ),
    ] = "demo"
    count: Annotated[
        int | None,
        Option("Number of samples of each model.", flags=("--count", "-n"), min=8, default="512, quick: 64"),
    ] = None
    seed: Annotated[
        int, Option("Seed of the first sample; sample i starts from seed + i in every model.", min=0, max=LAST_SEED)
    ] = 0
    steps: Annotated[
        tuple[int, ...],
        Option(
            "Number of denoising steps; repeat it to give the base and each PIXEL its own.",
            min=1,
            max=10_000,
            default="16 for demo images, else the pipelines'",
        ),
    ] = ()
    guidance: Guidance = Guidance()
    solver: Annotated[
        Literal["euler", "heun", "unipc"] | None,
        Option("Method of the steps, for all models alike.", default="each scheduler's own"),
    ] = None
    labels: Annotated[
        tuple[str, ...],
        Option(
            "Name of a PIXEL in the table; repeat it in their order.",
            "WORD",
            ("--label",),
            default="the folders' names",
        ),
    ] = ()
    continued: Annotated[
        str | None,
        Option(
            "Control: the latent base, trained on for as long on the same images.",
            "FOLDER",
            names="model",
            default="without this control",
        ),
    ] = None
    scratch: Annotated[
        str | None,
        Option(
            "Control: the pixel network, trained from random weights by the same recipe.",
            "FOLDER",
            names="model",
            default="without this control",
        ),
    ] = None
    prompts: Annotated[
        Path | None,
        Option(
            "Text file of prompts, one in each line, to use instead of captions.",
            "FILE",
            default="captions",
            names="file",
        ),
    ] = None
    metrics: Annotated[
        str,
        Option(
            "Published figures by pretrained networks, with commas between them: `fid`, `fid-tf`, `kid`, `fd-dinov2`, "
            "`cmmd`, `clip`.",
            "WORDS",
            default="none",
        ),
    ] = ""
    resolution: Annotated[int | None, Option("Side of the square images in pixels.", min=1, default="the base's")] = (
        None
    )
    device: Device = "auto"
    batch_size: Annotated[int, Option("Number of images that are sampled at once.", min=1)] = 16
    cache: Annotated[
        Path | None,
        Option(
            "Folder that keeps samples and scores, so that another run continues with them.", "FOLDER", default="none"
        ),
    ] = None
    quick: Annotated[
        bool, Option("Take few samples and no Frechet distances: enough to look, too little to claim.")
    ] = False
