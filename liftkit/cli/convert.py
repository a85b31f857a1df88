"""``liftkit convert``: fit the subspace, rewrite the projections, prove the result."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from liftkit.cli import console
from liftkit.cli.answers import conversion_data, plan_data
from liftkit.cli.push import Public, Push, check, send
from liftkit.options import Argument, ConvertOptions, FitOptions, Option

if TYPE_CHECKING:
    from liftkit.conversion.plan import Plan
    from liftkit.conversion.result import Conversion
    from liftkit.fit.subject import Subject
    from liftkit.lift import Lift


FLUX2 = "Flux2Transformer2DModel"


Model = Annotated[
    str, Argument("Model: a diffusers folder, a Hub id (organization/name), or `demo`.", "MODEL", names="model")
]
Output = Annotated[Path, Option("Output folder; it is made whole or not at all.", "FOLDER", ("--output", "-o"))]
DryRun = Annotated[bool, Option("Print what would happen, write nothing, and stop.")]


def convert(
    model: Model,
    output: Output,
    options: ConvertOptions,
    dry_run: DryRun = False,
    push: Push = None,
    public: Public = False,
) -> None:
    """Turn a latent flow model into a pixel model.

    It plans, fits a lift, rewrites two projections, writes the folder, and proves the result.

    Example: liftkit convert black-forest-labs/FLUX.2-klein-base-4B --images photos/ -o klein-pixel
    """
    console.first_word(f"reading {model}")
    from liftkit.checkpoint.folder import output_folder

    check(push, public)
    console.hold(output_folder(output, overwrite=options.overwrite))
    from liftkit.conversion.plan import make_plan

    plan = make_plan(model, output, options)
    print_plan(plan)
    console.result(dry_run=dry_run)
    if dry_run:
        console.out.print("dry run: nothing was written")
        return
    from liftkit.conversion.execute import execute

    # The projections of a given lift take no library that would speak, or that would have to be imported.
    if plan.lift is None or plan.proof != "projections":
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
    """In words, can the result be exported in the authors' format?"""
    from liftkit.formats.asymflow_limits import color_problem

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
    if lift.space == "latent":
        patch = f"{lift.patch_size} x {lift.patch_size} latents of {lift.channels} channels"
        return [("lift", f"rank {lift.rank} of {lift.dim}, a subspace of {patch}, for models from nothing")]
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
