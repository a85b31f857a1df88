"""What a user can choose, command by command: one typed object feeds the command line and the Python functions.

A field's default stands here and nowhere else, and so does the sentence that explains it, as ``liftkit COMMAND --help`` prints
it. Nothing here imports torch, so that the help comes at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from liftkit.errors import UsageError

LAST_SEED = 2**62
"""Of image 0; the others count up from it."""
STRENGTH = 0.6
"""Of a start image."""
Auto = Literal["auto"]
FitKind = Literal["procrustes", "pca", "jacobian"]
ScaleRule = Literal["norm", "lsq"]
ColorChoice = Literal["auto", "oklab", "srgb", "oklab-paper"]
ProofKind = Literal["auto", "model", "projections"]
Shards = Literal["copy", "link"]
Solver = Literal["euler", "heun", "sde", "unipc"]


@dataclass(frozen=True)
class Option:
    """How a field of an options object appears on the command line.

    Args:
        help: a full sentence that stands alone.
        metavar: what kind of word follows the option; by the field's type if None.
        flags: the option's names, where the field's own is not the only one.
        min, max: bounds of a number, both allowed.
        default: what is taken where the option is left out, for people, where that is no constant.
        parse: text to value, where the type does not say it.
    """

    help: str
    metavar: str | None = None
    flags: tuple[str, ...] = ()
    min: float | None = None
    max: float | None = None
    default: str | None = None
    parse: Callable[[str], Any] | None = None


@dataclass(frozen=True)
class Argument(Option):
    """A field that is given by its place, without a name."""


def number_or_auto(text: str) -> int | Auto:
    """The value of ``--num-images``.

    Raises:
        UsageError: if it is neither a positive whole number nor ``auto``.
    """
    if text == "auto":
        return "auto"
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"--num-images {text}: expected a number of images, or 'auto'")
    return int(text)


Device = Annotated[
    str,
    Option("Device to compute on: `cpu`, `cuda`, `cuda:1` or `mps`; `auto` takes the fastest one there is.", "DEVICE"),
]
Overwrite = Annotated[bool, Option("Replace what an earlier run of this command wrote to the output folder.")]
ShardsOption = Annotated[
    Shards,
    Option("How weight files without a changed tensor reach the output: a `copy`, or a hard `link` to the same file."),
]


@dataclass
class FitOptions:
    """Choices of a fit. The text of each field says what it does."""

    images: Annotated[
        str | None,
        Option(
            "Folder of images to fit on, nested and of any size; `demo` takes the embedded images.",
            "FOLDER",
            default="none",
        ),
    ] = None
    num_images: Annotated[
        int | Auto | None,
        Option(
            "Number of images to fit on, at most; `auto` stops when the fit has converged.",
            "INTEGER|auto",
            default="by tokens per image",
            parse=number_or_auto,
        ),
    ] = None
    resolution: Annotated[
        int | None, Option("Longest side of the images in pixels, at most.", min=1, default="the VAE's")
    ] = None
    kind: Annotated[
        FitKind,
        Option("How the subspace is found: Procrustes on pairs, PCA of the pixels, or the decoder's mean Jacobian."),
    ] = "procrustes"
    scale: Annotated[
        ScaleRule,
        Option("How the scale is found: `norm` matches energy as in the paper, `lsq` minimizes squared error."),
    ] = "norm"
    rank: Annotated[
        int | None,
        Option(
            "Rank of a PCA subspace for training from scratch; only with --kind pca.",
            min=1,
            default="the latents'",
        ),
    ] = None
    latents: Annotated[
        Literal["images", "normal", "model"],
        Option(
            "Where latents come from: encoded `images`, or without any image `normal` draws or the `model`'s own samples, "
            "decoded."
        ),
    ] = "images"
    prompts: Annotated[
        Path | None,
        Option("Text file of prompts for --latents model, one in each line.", "FILE", default="built-in prompts"),
    ] = None
    color: Annotated[
        ColorChoice | None,
        Option(
            "Color space of the pixels, normalized to the images; `oklab-paper` keeps the paper's constants, as the authors' "
            "format needs; `auto` compares and takes the best.",
            default="oklab-paper for FLUX.2, else oklab",
        ),
    ] = None
    vae: Annotated[
        Path | None,
        Option(
            "Folder of another VAE of the same latent space to fit through; `taef2`: the small one of FLUX.2's that comes "
            "with liftkit.",
            "FOLDER",
            default="the model's",
        ),
    ] = None
    device: Device = "auto"
    seed: Annotated[
        int, Option("Seed of the image order, of drawn latents and of the proof.", min=0, max=LAST_SEED)
    ] = 0


def rank_or_auto(text: str) -> int | Auto:
    """The value of ``--rank``.

    Raises:
        UsageError: if it is neither a whole number nor ``auto``.
    """
    if text == "auto":
        return "auto"
    if not text.isdecimal():
        raise UsageError(f"--rank {text}: expected a number of directions, or 'auto'")
    return int(text)


@dataclass(frozen=True, kw_only=True)
class InitOptions:
    """Choices of a model that is made from nothing."""

    architecture: Annotated[
        Literal["jit", "dit", "prx", "flux2"], Option("Kind of network, of which all are conditioned on a class.")
    ] = "jit"
    size: Annotated[
        Literal["tiny", "S", "B", "L", "H"], Option("Size of the network: for jit, B, L and H are the paper's.")
    ] = "B"
    classes: Annotated[
        str,
        Option(
            "Names of the classes: a text file with one in each line, a folder with one folder for each class, a number of "
            "nameless classes, or `demo` for the ten digits of the embedded data.",
            "FILE|FOLDER|INTEGER",
        ),
    ] = "1000"
    patch: Annotated[int | None, Option("Side of a token in pixels.", min=1, max=64, default="16, tiny: 8")] = None
    resolution: Annotated[
        int | None, Option("Side of the images in pixels.", min=1, max=4096, default="16 tokens, tiny: 8")
    ] = None
    rank: Annotated[
        int | Auto,
        Option(
            "Number of directions that the noise has in a token: 0 predicts the data (JiT), all of them the velocity; `auto` "
            "takes those that the images fill.",
            "INTEGER|auto",
            parse=rank_or_auto,
        ),
    ] = 8
    subspace: Annotated[
        Path | None,
        Option(
            "Lift with the leading directions, such as `liftkit fit --kind pca --rank 8` writes.",
            "FILE",
            default="fitted to --images",
        ),
    ] = None
    images: Annotated[
        str | None,
        Option("Folder of images whose leading directions are taken, or `demo`.", "FOLDER", default="none"),
    ] = None
    num_images: Annotated[int, Option("Number of these images, at most.", min=1)] = 10_000
    color: Annotated[Literal["srgb", "oklab"], Option("Color space of the pixels: sRGB in [-1, 1], or Oklab.")] = "srgb"
    seed: Annotated[int, Option("Seed of the weights, and of the order of the images.", min=0, max=LAST_SEED)] = 0
    overwrite: Overwrite = False


@dataclass
class ConvertOptions(FitOptions):
    """Choices of a conversion: those of its fit, and these."""

    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Option("Data type of the written transformer; `auto` keeps each tensor's own."),
    ] = "auto"
    rank: int | None = None  # a conversion has that of the latents
    overwrite: Overwrite = False
    lift: Annotated[
        Path | None, Option("Saved lift (.safetensors) to reuse instead of fitting one.", "FILE", default="none")
    ] = None
    proof_steps: int = 8
    shards: ShardsOption = "copy"
    proof: Annotated[
        ProofKind,
        Option("What is proved: the assembled `model`, the `projections` alone, or `auto` for what memory allows."),
    ] = "auto"
    save: Annotated[
        Literal["model", "adapter"],
        Option(
            "What is written: the whole `model`, or an `adapter` of only the changed weights, for sample --adapter and "
            "load_adapter."
        ),
    ] = "model"


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
        Option("Picture to start from instead of noise alone.", "FILE", ("--image",), default="none"),
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

    count: Annotated[int, Option("Number of images in the finished folder.", flags=("--count", "-n"), min=1, max=10**9)]


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """Choices of a comparison."""

    base: Annotated[str, Argument("Latent model: a folder, a Hub id, or `demo`.", "MODEL")]
    pixels: Annotated[tuple[str, ...], Argument("Pixel models: one or more converted folders.", "PIXEL")]
    real: Annotated[
        str,
        Option(
            "Folder of real images, or `demo` for the embedded ones; an image without a caption takes the empty prompt.",
            "FOLDER",
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
            default="without this control",
        ),
    ] = None
    scratch: Annotated[
        str | None,
        Option(
            "Control: the pixel network, trained from random weights by the same recipe.",
            "FOLDER",
            default="without this control",
        ),
    ] = None
    prompts: Annotated[
        Path | None,
        Option("Text file of prompts, one in each line, to use instead of captions.", "FILE", default="captions"),
    ] = None
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


@dataclass(frozen=True)
class ImportOptions:
    """Choices of ``liftkit import``; which of them mean something depends on what is imported."""

    base: Annotated[
        str | None,
        Option(
            "Model that the source is for. For an adapter: the latent model or its conversion; for a LoRA: the converted folder.",
            "FOLDER",
            default="none",
        ),
    ] = None
    config: Annotated[
        str | None,
        Option(
            "Diffusers folder of the same model, for a checkpoint: all but the transformer's weights comes from it.",
            "FOLDER",
            default="none",
        ),
    ] = None
    keep_adapter: Annotated[
        bool, Option("Make an adapter folder of ours, instead of merging the adapter into its base.")
    ] = False
    shards: ShardsOption = "copy"
    overwrite: Overwrite = False


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Choices of ``liftkit export``."""

    format_: Annotated[
        Literal["adapter", "asymflow-adapter"],
        Option(
            "Format of the adapter: our own, or that of the AsymFlow authors and their ComfyUI nodes.",
            flags=("--format",),
        ),
    ]
    base: Annotated[
        str | None,
        Option(
            "Model that the folder came from; needed where only that shows what a finetune has changed.",
            "FOLDER",
            default="as recorded",
        ),
    ] = None
    rank: Annotated[
        int | None,
        Option("Rank of the LoRA taken from a finetuned folder, whatever is lost.", min=1, default="its recipe's"),
    ] = None
    overwrite: Overwrite = False
