"""Choices of fits, of conversions, and of models that are made from nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from liftkit.errors import UsageError
from liftkit.options.option import LAST_SEED, Auto, Device, Option, Overwrite, ShardsOption

FitKind = Literal["procrustes", "pca", "jacobian"]
ScaleRule = Literal["norm", "lsq"]
ColorChoice = Literal["auto", "oklab", "srgb", "oklab-paper"]
ProofKind = Literal["auto", "model", "projections"]


def number_or_auto(value: str | int) -> int | Auto:
    """The value of ``--num-images``, or a default, which may be a number already.

    Raises:
        UsageError: if it is neither a positive whole number nor ``auto``.
    """
    text = str(value)
    if text == "auto":
        return "auto"
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"--num-images {text}: expected a number of images, or 'auto'")
    return int(text)


def rank_or_auto(value: str | int) -> int | Auto:
    """The value of ``--rank``, or a default, which may be a number already.

    Raises:
        UsageError: if it is neither a whole number nor ``auto``.
    """
    text = str(value)
    if text == "auto":
        return "auto"
    if not text.isdecimal():
        raise UsageError(f"--rank {text}: expected a number of directions, or 'auto'")
    return int(text)


@dataclass
class FitOptions:
    """Choices of a fit. The text of each field says what it does."""

    images: Annotated[
        str | None,
        Option(
            "Folder of images to fit on, nested and of any size; `demo` takes the embedded images.",
            "FOLDER",
            names="folder",
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
        int | Auto | None,
        Option(
            "Rank of a PCA subspace for training from scratch; `auto` takes the directions that the images fill; only with "
            "--kind pca.",
            "INTEGER|auto",
            default="the latents'",
            parse=rank_or_auto,
        ),
    ] = None
    space: Annotated[
        Literal["pixel", "latent"],
        Option(
            "Where a PCA subspace for training from scratch lies: in the pixels, or in the model's `latent` space, for models of "
            "low rank on latents; only with --kind pca and --rank."
        ),
    ] = "pixel"
    latents: Annotated[
        Literal["images", "normal", "model"],
        Option(
            "Where latents come from: encoded `images`, or without any image `normal` draws or the `model`'s own samples, "
            "decoded."
        ),
    ] = "images"
    prompts: Annotated[
        Path | None,
        Option(
            "Text file of prompts for --latents model, one in each line.",
            "FILE",
            default="built-in prompts",
            names="file",
        ),
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
            names="folder",
            default="the model's",
        ),
    ] = None
    device: Device = "auto"
    seed: Annotated[
        int, Option("Seed of the image order, of drawn latents and of the proof.", min=0, max=LAST_SEED)
    ] = 0


@dataclass
class ConvertOptions(FitOptions):
    """Choices of a conversion: those of its fit, and these."""

    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Option("Data type of the written transformer; `auto` keeps each tensor's own."),
    ] = "auto"
    rank: int | None = None  # a conversion has that of the latents
    space: Literal["pixel"] = "pixel"
    overwrite: Overwrite = False
    lift: Annotated[
        Path | None,
        Option("Saved lift (.safetensors) to reuse instead of fitting one.", "FILE", default="none", names="file"),
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
            names="path",
        ),
    ] = "1000"
    vae: Annotated[
        str | None,
        Option(
            "Make the model of latents instead of pixels, those of this VAE: its folder, that of a model that has it, `demo` or "
            "`taef2`.",
            "MODEL",
            default="none: pixels",
            names="folder",
        ),
    ] = None
    patch: Annotated[
        int | None,
        Option(
            "Side of a token in pixels, or in latents.",
            min=1,
            max=64,
            default="16, tiny: 8; latents: the subspace's, or 2",
        ),
    ] = None
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
            names="file",
        ),
    ] = None
    images: Annotated[
        str | None,
        Option(
            "Folder of images whose leading directions are taken, or `demo`.", "FOLDER", default="none", names="folder"
        ),
    ] = None
    num_images: Annotated[int, Option("Number of these images, at most.", min=1)] = 10_000
    color: Annotated[Literal["srgb", "oklab"], Option("Color space of the pixels: sRGB in [-1, 1], or Oklab.")] = "srgb"
    weights: Annotated[
        Path | None,
        Option(
            "Weights (.safetensors) under the names of the authors of JiT or AsymFlow, in the place of random ones: kind, size, "
            "patch and rank are then the file's.",
            "FILE",
            default="random",
            names="file",
        ),
    ] = None
    seed: Annotated[int, Option("Seed of the weights, and of the order of the images.", min=0, max=LAST_SEED)] = 0
    overwrite: Overwrite = False
