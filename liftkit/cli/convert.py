"""``liftkit convert``: fit the subspace, rewrite the projections, prove the result."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from liftkit.cli import console
from liftkit.cli.answers import conversion_data, plan_data
from liftkit.cli.push import Public, Push, check, send

if TYPE_CHECKING:
    from liftkit.conversion.plan import ConvertOptions, Plan
    from liftkit.conversion.result import Conversion
    from liftkit.fit.engine import FitOptions
    from liftkit.fit.subject import Subject
    from liftkit.lift import Lift


FLUX2 = "Flux2Transformer2DModel"


class Color(StrEnum):
    """Choices of ``--color``."""

    auto = "auto"
    oklab = "oklab"
    srgb = "srgb"
    oklab_paper = "oklab-paper"


class Kind(StrEnum):
    """Choices of ``--kind``."""

    procrustes = "procrustes"
    pca = "pca"
    jacobian = "jacobian"


class Scale(StrEnum):
    """Choices of ``--scale``."""

    norm = "norm"
    lsq = "lsq"


class Latents(StrEnum):
    """Choices of ``--latents``."""

    images = "images"
    normal = "normal"
    model = "model"


class Dtype(StrEnum):
    """Choices of ``--dtype``."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Shards(StrEnum):
    """Choices of ``--shards``."""

    copy = "copy"
    link = "link"


class ProofOn(StrEnum):
    """Choices of ``--proof``."""

    auto = "auto"
    model = "model"
    projections = "projections"


class Save(StrEnum):
    """Choices of ``--save``."""

    model = "model"
    adapter = "adapter"


def number_of_images(text: str | None) -> int | Literal["auto"] | None:
    """``--num-images``: a number, ``auto``, or not given."""
    if text is None:
        return None
    if text == "auto":
        return "auto"
    if not text.isdigit() or int(text) < 1:
        from liftkit.errors import UsageError

        raise UsageError(f"--num-images {text}: expected a number of images, or 'auto'")
    return int(text)


Model = Annotated[
    str,
    typer.Argument(help="A diffusers folder, a Hub id such as organization/name, or 'demo' for the embedded model."),
]
Images = Annotated[
    str | None, typer.Option(help="A folder of images to fit on (nested, any sizes), or 'demo' for the embedded data.")
]
NumImages = Annotated[
    str | None,
    typer.Option(help="Images to fit on; auto stops when the fit has converged.", show_default="by tokens per image"),
]
Resolution = Annotated[int | None, typer.Option(min=1, help="Side of the images at most.", show_default="the VAE's")]
KindOption = Annotated[
    Kind, typer.Option(help="Procrustes on pairs, the PCA subspace, or the decoder's mean Jacobian.")
]
ScaleOption = Annotated[Scale, typer.Option(help="norm matches energy, as the paper; lsq minimizes the squared error.")]
LatentsOption = Annotated[
    Latents,
    typer.Option(help="Encode images; or decode normal latents or the model's own samples, and need no images."),
]
Prompts = Annotated[Path | None, typer.Option(help="Prompts, one a line, for --latents model.")]
ColorOption = Annotated[
    Color | None,
    typer.Option(
        help="Color space, normalized to the images; auto compares; oklab-paper has the paper's constants, as the authors' "
        "format needs.",
        show_default="oklab-paper for FLUX.2, else oklab",
    ),
]
VaeOption = Annotated[
    Path | None,
    typer.Option("--vae", help="Fit through the VAE in this folder, of the same latent space as the model's own."),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, mps, ...")]
Seed = Annotated[int, typer.Option(min=0, max=2**62, help="Of the image order, of drawn latents and of the proof.")]


def convert(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to make.")],
    images: Images = None,
    num_images: NumImages = None,
    resolution: Resolution = None,
    kind: KindOption = Kind.procrustes,
    scale: ScaleOption = Scale.norm,
    latents: LatentsOption = Latents.images,
    prompts: Prompts = None,
    color: ColorOption = None,
    vae: VaeOption = None,
    device: Device = "auto",
    dtype: Annotated[
        Dtype, typer.Option(help="Of the written transformer; auto keeps each tensor's own.")
    ] = Dtype.auto,
    seed: Seed = 0,
    lift: Annotated[Path | None, typer.Option(help="Reuse a saved lift (.safetensors) instead of fitting one.")] = None,
    shards: Annotated[
        Shards,
        typer.Option(help="Weight files without a changed tensor: copy, or link (a second name for the same file)."),
    ] = Shards.copy,
    proof: Annotated[
        ProofOn, typer.Option(help="Prove on the assembled model, on the projections alone, or as memory allows.")
    ] = ProofOn.auto,
    save: Annotated[
        Save, typer.Option(help="The whole model, or an adapter: what changes, alone, for --adapter and load_adapter.")
    ] = Save.model,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    push: Push = None,
    public: Public = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier conversion.", rich_help_panel="Dangerous options")
    ] = False,
) -> None:
    """Turn a latent flow model into a pixel model: plan, fit, surgery, write, prove.

    Example: liftkit convert black-forest-labs/FLUX.2-klein-base-4B --images photos/ -o klein-pixel
    """
    from liftkit.checkpoint.folder import output_folder
    from liftkit.conversion.plan import ConvertOptions, make_plan

    check(push, public)
    options = ConvertOptions(
        images=images,
        num_images=number_of_images(num_images),
        resolution=resolution,
        kind=kind.value,
        scale=scale.value,
        latents=latents.value,
        prompts=prompts,
        color=None if color is None else color.value,
        vae=vae,
        device=device,
        dtype=dtype.value,
        seed=seed,
        overwrite=overwrite,
        lift=lift,
        shards=shards.value,
        proof=proof.value,
        save=save.value,
    )
    console.hold(output_folder(output, overwrite=overwrite))
    plan = make_plan(model, output, options)
    print_plan(plan)
    console.result(dry_run=dry_run)
    if dry_run:
        console.out.print("dry run: nothing was written")
        return
    from liftkit.conversion.execute import execute

    console.quiet_libraries()
    print_summary(execute(plan, console.Bars()))
    send(output, push, public)


def print_plan(plan: Plan) -> None:
    """What would happen."""
    console.result(plan=plan_data(plan))
    options = plan.options
    rewritten = ", ".join(f"{name} {tuple(entry.shape)}" for name, entry in plan.rewritten.items())
    how = "copied byte for byte" if options.shards == "copy" else "linked or copied, by whole shards"
    copied = how if options.dtype == "auto" else f"cast to {options.dtype}"
    console.table(
        "Plan",
        [
            ("model", f"{plan.model.source} ({plan.model.index['_class_name']}, {plan.spec.name})"),
            ("lift", f"rank {plan.rank} of {plan.dim}: latent patches {plan.latent_patch} x {plan.latent_patch}, "
                     f"pixel patches {plan.side} x {plan.side}"),
            *data_rows(plan, options, plan.lift is not None),
            ("kept", f"{plan.kept} tensors, {copied}"),
            ("rewritten", rewritten),
            ("transformer", console.size(plan.transformer_bytes)),
            ("disk", f"{console.size(plan.needed_bytes)} for {plan.output}: {_parts(plan)}"),
            ("proof", f"on the {plan.proof} ({plan.reasons['proof']})"),
            ("device", f"{options.device} ({plan.reasons['device']})"),
            *((("export", _export(plan)),) if plan.spec.name == FLUX2 else ()),
            *(("limit", limit) for limit in plan.limits),
            *([("files", plan.left_out.summary())] if plan.left_out.left_out else []),
        ],
    )  # fmt: skip


def _export(plan: Plan) -> str:
    """Whether the result can be exported in the authors' format."""
    from liftkit.formats.asymflow_adapter import color_problem

    problem = color_problem(plan.color)
    return f"not to asymflow-adapter: {problem}" if problem else "to asymflow-adapter: yes"


def _parts(plan: Plan) -> str:
    """What takes the disk, the largest first."""
    parts = sorted(plan.parts.items(), key=lambda part: -part[1])
    return ", ".join(f"{name} {console.size(count)}" for name, count in parts if count > 0)


def data_rows(subject: Subject, options: ConvertOptions | FitOptions, reused: bool = False) -> list[tuple[str, str]]:
    """What a fit would use, and why."""
    if reused:
        return [("fit", f"reuse {getattr(options, 'lift', None)}")]
    what = {"images": str(options.images), "normal": "normal latents, decoded", "model": "the model's own samples"}
    count = "until converged" if options.num_images == "auto" else f"{options.num_images} at most"
    through = [("vae", str(options.vae))] if options.vae is not None else []
    return [
        ("fit", f"{options.kind}, {options.scale} scale, {options.color}"),
        *through,
        ("data", f"{what[options.latents]}, {count} ({subject.reasons['num_images']})"),
        *([("found", subject.reasons["images"])] if "images" in subject.reasons else []),
        ("resolution", f"{options.resolution} ({subject.reasons['resolution']})"),
    ]


def lift_rows(lift: Lift) -> list[tuple[str, str]]:
    """What a lift is and how well it aligns."""
    mean = ", ".join(f"{value:.4f}" for value in lift.color.mean)
    rows = [("lift", f"rank {lift.rank} of {lift.dim}, scale {lift.scale:.4f}, {lift.color.name} "
                     f"(mean {mean}, std {lift.color.std:.4f})")]  # fmt: skip
    alignment = lift.figures.get("alignment")
    if alignment is None:
        return rows
    from liftkit.fit.verdict import share

    figures = {name: entry["value"] for name, entry in alignment["figures"].items()}
    if alignment["color_reason"] != "as asked":
        rows.append(("color", alignment["color_reason"]))
    return rows + [
        ("energy captured", f"{figures['energy_captured']:.2%} of the pixels' (best subspace: {figures['energy_best']:.2%})"),
        ("explained", f"{share(figures['r2_pixels'])} of pixel variance by the lift alone, "
                      f"{share(figures['r2_pixels_linear'])} by the best linear map"),
        ("verdict", alignment["verdict"]["text"]),
        *(("to try", advice) for advice in alignment["verdict"]["advice"]),
    ]  # fmt: skip


def _outcome(result: Conversion) -> list[tuple[str, str]]:
    output = result.output
    if result.plan.options.save == "adapter":
        base = result.plan.model.source
        return [
            ("adapter", str(output)),
            ("next", f'liftkit sample {base} --adapter {output} -p "a prompt" -o samples.png'),
        ]
    return [
        ("model", str(output)),
        ("report", str(output / "alignment.html")),
        ("next", f'liftkit sample {output} -p "a prompt" -o samples.png'),
    ]


def print_summary(result: Conversion) -> None:
    """What came out, and what to do next."""
    proof = result.proof
    console.result(**conversion_data(result))
    rows = [
        *lift_rows(result.lift),
        ("proof", f"deviation {proof.exact:.1e} in full precision, {proof.stored:.1e} as stored in {proof.dtype} "
                  f"({proof.steps} steps, on the {proof.kind})"),
        *_outcome(result),
    ]  # fmt: skip
    console.table("Converted", rows)
    console.tallies(result.tallies)
