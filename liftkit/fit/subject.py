"""The model that a lift is fitted to: found, checked, and the automatic choices that follow from it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from liftkit.checkpoint.classes import pipeline_parts
from liftkit.checkpoint.components import Component, read_components, read_vae
from liftkit.checkpoint.files import expanded
from liftkit.checkpoint.model import ModelFolder, find_model
from liftkit.checkpoint.text import read_json
from liftkit.data.images import check_folder
from liftkit.data.survey import survey
from liftkit.device import choose_device
from liftkit.errors import UsageError
from liftkit.fit.engine import color_names
from liftkit.models.registry import architecture, is_lifted
from liftkit.models.spec import Architecture
from liftkit.models.surgery import check_liftable
from liftkit.models.vaes import vae_geometry
from liftkit.options import FitOptions

FLOW_SCHEDULERS = ("FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler", "DPMSolverMultistepScheduler")
# Enough token pairs that sampling noise in A is far below its misfit, and enough images that no one scene rules.
ENOUGH_TOKENS, FEWEST_IMAGES, MOST_IMAGES = 131_072, 256, 2048
Options = TypeVar("Options", bound=FitOptions)


@dataclass
class Subject:
    """A model that a lift can be fitted to, checked.

    Args:
        model: the source.
        spec: its architecture.
        config: the transformer's config.
        factor: f of the VAE.
        components: its components, checked.
        reasons: why an automatic choice fell as it did, by name.
    """

    model: ModelFolder
    spec: Architecture
    config: dict[str, Any]
    factor: int
    components: list[Component] = field(default_factory=list, kw_only=True)
    reasons: dict[str, str] = field(default_factory=dict, kw_only=True)

    @property
    def latent_patch(self) -> int:
        """Side of a token's patch on the VAE's grid."""
        return self.spec.latent_patch(self.config)

    @property
    def side(self) -> int:
        """P, side of a token's pixel patch."""
        return self.factor * self.latent_patch

    @property
    def rank(self) -> int:
        """r."""
        return self.spec.token_size(self.config)

    @property
    def dim(self) -> int:
        """D."""
        return 3 * self.side**2


def inspect_model(model: str) -> Subject:
    """A model that a lift can be fitted to.

    Raises:
        UsageError: if it is no flow pipeline that liftkit knows.
    """
    folder = find_model(model, check=_check_model)
    spec, config, factor = _check_model(folder)
    parts = read_components(folder)
    return Subject(folder, spec, config, factor, components=parts)


def check_vae(path: Path, subject: Subject) -> None:
    """Raise unless a VAE has latents of the model's shape.

    Raises:
        UsageError: if it is none that liftkit knows, or its latents have other channels, another factor or patch.
    """
    part = read_vae(path)
    config = {**read_json(part.path / "config.json"), "_class_name": part.class_name}
    try:
        found = vae_geometry(config)
    except (KeyError, TypeError) as error:
        raise UsageError(f"--vae {path}: its config.json lacks {error}") from error
    wanted = subject.factor, subject.rank // subject.latent_patch**2
    if found != wanted:
        raise UsageError(
            f"--vae {path}: its latents have {found[1]} channels at 1/{found[0]} of the image's size, the model's "
            f"{wanted[1]} at 1/{wanted[0]}; give a VAE of the same latent space"
        )
    if part.class_name == "AutoencoderKLFlux2" and subject.latent_patch != 2:
        raise UsageError(
            f"--vae {path}: it normalizes patches of 2 x 2, the model's tokens are {subject.latent_patch} x "
            f"{subject.latent_patch}; give a VAE of the same latent space"
        )


def check_sources(options: FitOptions) -> None:
    """Raise unless the options say what to fit on.

    Raises:
        UsageError: naming the flag that is missing or wrong.
    """
    if options.latents == "model" and options.prompts is None and options.images != "demo":
        raise UsageError("--latents model needs --prompts FILE, one prompt a line")
    if options.prompts is not None and not options.prompts.is_file():
        raise UsageError(f"--prompts {options.prompts}: no such file")
    if options.latents != "images":
        return
    if options.images is None:
        raise UsageError(
            "--images is missing: give a folder of images, or 'demo'; or fit without any by --latents normal"
        )
    if options.images != "demo":
        check_folder(expanded(options.images), f"--images {options.images}", "give a folder of images, or 'demo'")


def note_images(subject: Subject, options: FitOptions) -> None:
    """Look at the headers of the pictures of ``--images``, and keep what was found among the subject's reasons, for the plan.

    Raises:
        UsageError: if none of them can be used.
    """
    if options.latents != "images" or options.images in (None, "demo"):
        return
    count = MOST_IMAGES if options.num_images == "auto" else options.num_images
    assert options.images is not None
    assert isinstance(count, int)
    found = survey(options.images, count, options.seed, subject.side)
    if not found.used:
        raise UsageError(f"--images {options.images}: none of {found.found} images can be used: {found.reasons()}")
    subject.reasons["images"] = found.summary() or f"{found.used} images, all can be used"


def _check_model(folder: ModelFolder) -> tuple[Architecture, dict[str, Any], int]:
    """Raise unless this is a flow model that can be lifted; its architecture, transformer config and VAE factor."""
    name = folder.class_of("transformer")
    if name is None:
        other = next((part for part in ("unet", "prior") if folder.class_of(part)), None)
        found = f"its network is a {other} ({folder.class_of(other)})" if other else "it has no transformer"
        raise UsageError(f"{folder.source}: {found}; liftkit converts flow transformers")
    if "quantization_config" in folder.config("transformer"):
        raise UsageError(
            f"{folder.source}: the transformer is quantized; convert the full-precision checkpoint, then quantize"
        )
    if is_lifted(name):
        raise UsageError(f"{folder.source}: already a pixel model ({name})")
    spec = architecture(name)
    if folder.class_of("vae") is None:
        raise UsageError(f"{folder.source}: the pipeline has no VAE; a lift needs the latents' own autoencoder")
    second = [part for part in folder.components if part != "transformer" and folder.class_of(part) == name]
    if set(second) - set(spec.companions):
        raise UsageError(
            f"{folder.source}: {second[0]} is a second {name}, which takes over at a noise level of its own; models of two "
            "such experts are not supported"
        )
    config = folder.config("transformer")
    try:
        check_liftable(spec, config)
    except UsageError as error:
        raise UsageError(f"{folder.source}: {error}") from error
    try:
        factor, channels = vae_geometry(folder.config("vae"))
        patch, size = spec.latent_patch(config), spec.token_size(config)
    except (KeyError, TypeError) as error:
        raise UsageError(
            f"{folder.source}: the config of transformer or VAE lacks {error}; is the model complete?"
        ) from error
    if channels * patch * patch != size:
        raise UsageError(
            f"{folder.source}: the transformer's tokens have {size} numbers, the VAE's latents give "
            f"{channels} x {patch} x {patch} = {channels * patch * patch}; does the VAE belong to it?"
        )
    _check_flow(folder)
    _check_pipeline(folder)
    return spec, config, factor


def _check_pipeline(folder: ModelFolder) -> None:
    name = str(folder.index["_class_name"])
    parts = pipeline_parts(name)
    lacking = [part for part in ("transformer", "vae", "scheduler") if parts is None or part not in parts[1]]
    if lacking:
        raise UsageError(
            f"{folder.path / 'model_index.json'}: _class_name {name!r} takes no {lacking[0]}, so it cannot be this model's pipeline"
        )


def _check_flow(folder: ModelFolder) -> None:
    name = folder.class_of("scheduler")
    # Multistep solvers serve other models too, and by default predict noise.
    default = "flow_prediction" if name == FLOW_SCHEDULERS[0] else "epsilon"
    prediction = folder.config("scheduler").get("prediction_type", default) if name else None
    if name not in FLOW_SCHEDULERS or prediction != "flow_prediction":
        what = f"{name} with {prediction}" if name in FLOW_SCHEDULERS else str(name)
        raise UsageError(
            f"{folder.source}: the scheduler ({what}) is not of a flow model; supported: "
            f"{', '.join(FLOW_SCHEDULERS)} with flow_prediction"
        )


def choose(options: Options, subject: Subject) -> Options:
    """Make the automatic choices; their reasons go to the subject.

    Raises:
        UsageError: if a choice is out of range.
    """
    color_names(options.color)
    if options.vae is not None:
        check_vae(options.vae, subject)
    resolution = options.resolution or subject.model.image_size()
    if resolution < subject.side:
        raise UsageError(
            f"--resolution {resolution}: smaller than the {subject.side} x {subject.side} pixels of one token"
        )
    resolution -= resolution % subject.side
    tokens = (resolution // subject.side) ** 2
    count = options.num_images or max(FEWEST_IMAGES, min(MOST_IMAGES, -(-ENOUGH_TOKENS // tokens)))
    device, why = choose_device(options.device)
    subject.reasons |= {
        "resolution": "as asked" if options.resolution else "the VAE's own sample_size",
        "num_images": "as asked"
        if options.num_images
        else f"for {ENOUGH_TOKENS} tokens, {tokens} an image of full size",
        "device": why,
    }
    return replace(
        options, resolution=resolution, num_images=count, device=device, color=options.color or subject.spec.color
    )
