"""The plan of a conversion: everything that can be known, checked and printed before anything is computed."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from liftkit.checkpoint.folder import check_space, check_target, tree_size
from liftkit.checkpoint.header import TensorEntry, tensor_bytes
from liftkit.checkpoint.model import ModelFolder, Weights, find_model
from liftkit.checkpoint.rewrite import rewritten_size
from liftkit.errors import UsageError
from liftkit.lift import Lift
from liftkit.models.latents import vae_geometry
from liftkit.models.registry import architecture, is_lifted
from liftkit.models.spec import Architecture

FLOW_SCHEDULERS = ("FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler", "DPMSolverMultistepScheduler")
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
# Enough token pairs that sampling noise in A is far below its misfit, and enough images that no one scene rules.
ENOUGH_TOKENS, FEWEST_IMAGES, MOST_IMAGES = 131_072, 256, 2048


@dataclass
class ConvertOptions:
    """What a user can choose; the command line and :func:`liftkit.convert` share it.

    Args:
        images: a folder of images, or ``demo``; not needed with ``lift``.
        num_images: how many to fit on; None decides from the tokens per image.
        resolution: side of the fitted images at most; None takes the VAE's own.
        color: ``oklab`` or ``srgb``, normalised to the images; ``oklab-paper`` has the paper's constants.
        device: ``auto``, ``cpu``, ``cuda``, ``mps``, ...
        dtype: of the written transformer: ``auto`` keeps every tensor's own.
        seed: of the image order and the proof.
        overwrite: replace an existing output.
        lift: reuse a saved lift instead of fitting one.
        proof_steps: Euler steps of the proof.
    """

    images: str | None = None
    num_images: int | None = None
    resolution: int | None = None
    color: Literal["oklab", "srgb", "oklab-paper"] = "oklab"
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    seed: int = 0
    overwrite: bool = False
    lift: Path | None = None
    proof_steps: int = 8


@dataclass
class Plan:
    """What a conversion would do.

    Args:
        model: the source.
        output: the target folder.
        spec: its architecture.
        config: the transformer's config.
        weights: the transformer's files.
        factor: f of the VAE.
        options: as given, with every automatic choice made.
        rewritten: tensors that change, by name, as they will be.
        kept: number of tensors whose bytes are copied.
        transformer_bytes: of the new transformer.
        needed_bytes: disk that the whole output takes.
        reasons: why an automatic choice fell as it did, by name.
        lift: a given lift, checked.
    """

    model: ModelFolder
    output: Path
    spec: Architecture
    config: dict[str, Any]
    weights: Weights
    factor: int
    options: ConvertOptions
    rewritten: dict[str, TensorEntry]
    kept: int
    transformer_bytes: int
    needed_bytes: int
    reasons: dict[str, str] = field(default_factory=dict)
    lift: Lift | None = None

    @property
    def latent_patch(self) -> int:
        """Side of a token's patch on the VAE's grid."""
        return self.spec.latent_patch(self.config)

    @property
    def rank(self) -> int:
        """r."""
        return self.spec.token_size(self.config)

    @property
    def dim(self) -> int:
        """D."""
        return 3 * (self.factor * self.latent_patch) ** 2


def make_plan(model: str, output: Path, options: ConvertOptions) -> Plan:
    """Check everything that can be checked, and say what would happen.

    Raises:
        UsageError: if the model, the options, the lift, the target or the disk will not do.
    """
    check_target(output, overwrite=options.overwrite)
    folder = find_model(model)
    spec, config, factor = _check_model(folder)
    weights = folder.weights("transformer")
    folder.weights("vae")
    reasons: dict[str, str] = {}
    options = _choose(options, folder, factor * spec.latent_patch(config), reasons)
    plan = Plan(folder, output, spec, config, weights, factor, options, {}, 0, 0, 0, reasons)
    if options.lift is not None:
        from liftkit.conversion.surgery import check_lift

        plan.lift = Lift.load(options.lift)
        check_lift(spec, config, factor, plan.lift)
    elif options.images is None:
        raise UsageError("--images is missing: give a folder of images, 'demo', or a fitted lift by --lift")
    elif options.images != "demo" and not Path(options.images).expanduser().is_dir():
        raise UsageError(f"--images {options.images}: no such folder; give a folder of images, or 'demo'")
    _plan_tensors(plan)
    # The source's VAE stays beside the new model, and every other component comes along.
    others = sum(tree_size(path) for path in folder.path.iterdir() if path.name != "transformer")
    plan.needed_bytes = plan.transformer_bytes + others + 2 * sum(e.size for e in plan.rewritten.values()) + 4_000_000
    check_space(output, plan.needed_bytes)
    return plan


def _check_model(folder: ModelFolder) -> tuple[Architecture, dict[str, Any], int]:
    """Whether this is a flow model that can be lifted: its architecture, transformer config and VAE factor."""
    name = folder.class_of("transformer")
    if name is None:
        other = next((part for part in ("unet", "prior") if folder.class_of(part)), None)
        found = f"its network is a {other} ({folder.class_of(other)})" if other else "it has no transformer"
        raise UsageError(f"{folder.source}: {found}; liftkit converts flow transformers")
    if is_lifted(name):
        raise UsageError(f"{folder.source}: already a pixel model ({name})")
    spec = architecture(name)
    if folder.class_of("vae") is None:
        raise UsageError(f"{folder.source}: the pipeline has no VAE; a lift needs the latents' own autoencoder")
    config = folder.config("transformer")
    factor, channels = vae_geometry(folder.config("vae"))
    patch = spec.latent_patch(config)
    if channels * patch * patch != spec.token_size(config):
        raise UsageError(
            f"{folder.source}: the transformer's tokens have {spec.token_size(config)} numbers, the VAE's latents give "
            f"{channels} x {patch} x {patch} = {channels * patch * patch}; inpainting and control variants are not supported"
        )
    _check_flow(folder)
    return spec, config, factor


def _check_flow(folder: ModelFolder) -> None:
    name = folder.class_of("scheduler")
    prediction = folder.config("scheduler").get("prediction_type", "flow_prediction") if name else None
    if name not in FLOW_SCHEDULERS or prediction != "flow_prediction":
        what = f"{name} with {prediction}" if name in FLOW_SCHEDULERS else str(name)
        raise UsageError(
            f"{folder.source}: the scheduler ({what}) is not of a flow model; supported: "
            f"{', '.join(FLOW_SCHEDULERS)} with flow_prediction"
        )


def _choose(options: ConvertOptions, folder: ModelFolder, side: int, reasons: dict[str, str]) -> ConvertOptions:
    """Make the automatic choices, each with its reason."""
    from dataclasses import replace

    native = folder.config("vae").get("sample_size", 1024)
    resolution = options.resolution or (native[0] if isinstance(native, list) else native)
    reasons["resolution"] = "as asked" if options.resolution else "the VAE's own sample_size"
    if resolution < side:
        raise UsageError(f"--resolution {resolution}: smaller than the {side} x {side} pixels of one token")
    tokens = (resolution // side) ** 2
    count = options.num_images or max(FEWEST_IMAGES, min(MOST_IMAGES, -(-ENOUGH_TOKENS // tokens)))
    reasons["num_images"] = "as asked" if options.num_images else f"at least {ENOUGH_TOKENS} tokens, {tokens} an image"
    device, why = choose_device(options.device)
    reasons["device"] = why
    return replace(options, resolution=resolution, num_images=count, device=device)


def choose_device(wanted: str) -> tuple[str, str]:
    """The device of ``--device`` and why.

    Raises:
        UsageError: if it is unknown or not there.
    """
    import torch

    if wanted == "auto":
        for name, there in (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available())):
            if there:
                return name, f"{name} is available"
        return "cpu", "no GPU is available"
    try:
        torch.empty(1, device=wanted)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(
            f"--device {wanted}: not available here ({str(error).splitlines()[0]}); try auto or cpu"
        ) from error
    return wanted, "as asked"


def _plan_tensors(plan: Plan) -> None:
    """Which tensors change and what the new transformer weighs, from headers and config alone."""
    growth = plan.dim // plan.rank if plan.dim % plan.rank == 0 else plan.dim / plan.rank
    wanted = None if plan.options.dtype == "auto" else DTYPES[plan.options.dtype]
    for projection, side in plan.spec.projections:
        for kind in ("weight", "bias") if side == "output" else ("weight",):
            name = f"{projection.path}.{kind}"
            if name not in plan.weights.where:
                if kind == "weight":
                    raise UsageError(
                        f"{plan.model.path / 'transformer'}: tensor {name!r} is missing; is the model complete?"
                    )
                continue
            entry = plan.weights.headers[plan.weights.where[name]].tensors[name]
            axis = 1 if side == "input" else 0
            shape = tuple(round(n * growth) if i == axis else n for i, n in enumerate(entry.shape))
            dtype = wanted or entry.dtype
            plan.rewritten[name] = TensorEntry(dtype, shape, 0, tensor_bytes(dtype, shape))
    plan.rewritten["lift.basis"] = TensorEntry("F32", (plan.dim, plan.rank), 0, 4 * plan.dim * plan.rank)
    plan.kept = len(plan.weights.where) - (len(plan.rewritten) - 1)
    for header in plan.weights.headers.values():
        here = {
            name: entry for name, entry in plan.rewritten.items() if plan.weights.where.get(name) == header.path.name
        }
        plan.transformer_bytes += rewritten_size(header, here, wanted)
    plan.transformer_bytes += plan.rewritten["lift.basis"].size
