"""``liftkit convert``: fit the subspace, rewrite the projections, prove the result."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from liftkit.cli import console

if TYPE_CHECKING:
    from liftkit.conversion.execute import Conversion
    from liftkit.conversion.plan import Plan


class Color(StrEnum):
    """Choices of ``--color``."""

    oklab = "oklab"
    srgb = "srgb"
    oklab_paper = "oklab-paper"


class Dtype(StrEnum):
    """Choices of ``--dtype``."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def convert(
    model: Annotated[str, typer.Argument(help="A diffusers folder, or a Hub id such as organisation/name.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to make.")],
    images: Annotated[
        str | None,
        typer.Option(help="A folder of images to fit on (nested, any sizes), or 'demo' for the embedded data."),
    ] = None,
    num_images: Annotated[
        int | None, typer.Option(min=1, help="Images to fit on [default: by tokens per image]")
    ] = None,
    resolution: Annotated[
        int | None, typer.Option(min=1, help="Side of the images at most [default: the VAE's]")
    ] = None,
    color: Annotated[
        Color, typer.Option(help="Colour space, normalised to the images; oklab-paper has the paper's constants.")
    ] = Color.oklab,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, mps, ...")] = "auto",
    dtype: Annotated[
        Dtype, typer.Option(help="Of the written transformer; auto keeps each tensor's own.")
    ] = Dtype.auto,
    seed: Annotated[int, typer.Option(help="Of the image order and the proof.")] = 0,
    lift: Annotated[Path | None, typer.Option(help="Reuse a saved lift (.safetensors) instead of fitting one.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing output.", rich_help_panel="Dangerous options")
    ] = False,
) -> None:
    """Turn a latent flow model into a pixel model: plan, fit, surgery, write, prove.

    Example: liftkit convert black-forest-labs/FLUX.2-klein-base-4B --images photos/ -o klein-pixel
    """
    from liftkit.conversion.plan import ConvertOptions, make_plan

    options = ConvertOptions(
        images=images,
        num_images=num_images,
        resolution=resolution,
        color=color.value,
        device=device,
        dtype=dtype.value,
        seed=seed,
        overwrite=overwrite,
        lift=lift,
    )
    plan = make_plan(model, output, options)
    print_plan(plan)
    if dry_run:
        console.out.print("dry run: nothing was written")
        return
    from liftkit.conversion.execute import execute

    console.quiet_libraries()
    print_summary(execute(plan, console.Bars()))


def print_plan(plan: Plan) -> None:
    """What would happen."""
    options = plan.options
    rewritten = ", ".join(f"{name} {tuple(entry.shape)}" for name, entry in plan.rewritten.items())
    if plan.lift is not None:
        source = f"reuse {options.lift}"
    else:
        source = f"{options.num_images} images at most ({plan.reasons['num_images']}), {options.images}"
    console.table(
        "Plan",
        [
            ("model", f"{plan.model.source} ({plan.model.index['_class_name']}, {plan.spec.name})"),
            ("lift", f"rank {plan.rank} of {plan.dim}: latent patches {plan.latent_patch} x {plan.latent_patch}, "
                     f"pixel patches {plan.factor * plan.latent_patch} x {plan.factor * plan.latent_patch}"),
            ("fit", source),
            ("resolution", f"{options.resolution} ({plan.reasons['resolution']})"),
            ("kept", f"{plan.kept} tensors, copied byte for byte"),
            ("rewritten", rewritten),
            ("transformer", console.size(plan.transformer_bytes)),
            ("disk", f"{console.size(plan.needed_bytes)} for {plan.output}"),
            ("device", f"{options.device} ({plan.reasons['device']})"),
        ],
    )  # fmt: skip


def print_summary(result: Conversion) -> None:
    """What came out, and what to do next."""
    lift, proof, output = result.lift, result.proof, result.output
    figures = result.figures.get("held_out") or result.figures.get("fitted")
    rows = [("lift", f"rank {lift.rank} of {lift.dim}, scale {lift.scale:.4f}, {lift.color}")]
    if figures:
        rows += [
            ("energy captured", f"{figures['energy_captured']:.2%} of the pixels' (best subspace: {figures['energy_best']:.2%})"),
            ("explained", f"{figures['r2_pixels']:.1%} of pixel variance by the lift, "
                          f"{figures['r2_pixels_linear']:.1%} by any linear map"),
        ]  # fmt: skip
    rows += [
        ("proof", f"deviation {proof.exact:.1e} in full precision, {proof.stored:.1e} as stored in {proof.dtype} "
                  f"({proof.steps} steps)"),
        ("model", str(output)),
        ("pictures", str(output / "alignment.html")),
        ("next", f'liftkit sample {output} -p "a prompt" -o samples.png'),
    ]  # fmt: skip
    console.table("Converted", rows)
    if result.skipped:
        console.note(result.skipped)
