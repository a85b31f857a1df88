"""The fit of a plan: a lift, its figures and a few pictures."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from liftkit.color import SRGB, ColorSpace, Oklab
from liftkit.conversion.plan import Plan
from liftkit.data.images import ImageSource, batches, open_images
from liftkit.errors import UsageError
from liftkit.fit.alignment import alignment
from liftkit.fit.procrustes import fit_procrustes
from liftkit.fit.stream import Collected, collect, fitted_color, normalised
from liftkit.lift import Lift
from liftkit.models.latents import LatentSpace
from liftkit.progress import Observer
from liftkit.report.pictures import Row
from liftkit.tokens import patchify, unpatchify

PIXELS_AT_ONCE = 4 * 1024 * 1024


@dataclass
class Fit:
    """A lift, its figures and pictures."""

    lift: Lift
    figures: dict[str, Any]
    gallery: list[Row]


def plan_images(plan: Plan) -> ImageSource | None:
    """The images of a plan, or None where a saved lift needs none."""
    options = plan.options
    return open_images(options.images, options.num_images or 0, options.seed) if options.images else None


def fit_plan(plan: Plan, source: ImageSource | None, observer: Observer) -> Fit:
    """The lift of a plan: a given one, or fitted to the latents of images."""
    if source is None:
        assert plan.lift is not None
        return Fit(plan.lift, plan.lift.figures.get("alignment", {}), [])
    space = open_latents(plan)
    if plan.lift is not None:
        figures = plan.lift.figures.get("alignment", {})
        return Fit(plan.lift, figures, pictures(space, source, plan.lift, plan.options.resolution or 0))
    options = plan.options
    assert options.resolution is not None
    name, fixed = color_choice(options.color)
    collected = collect(
        space,
        source,
        name,
        latent_patch=plan.latent_patch,
        resolution=options.resolution,
        batch_size=max(1, min(16, len(source) // 8, PIXELS_AT_ONCE // options.resolution**2)),
        observer=observer,
    )
    lift, figures = fit_collected(plan, collected, name, fixed)
    return Fit(lift, figures, pictures(space, source, lift, options.resolution))


def fit_collected(
    plan: Plan, collected: Collected, space: type[ColorSpace], fixed: ColorSpace | None
) -> tuple[Lift, dict[str, Any]]:
    """Fit on moments of plain colour values, and take the figures on both halves."""
    color = fixed or fitted_color(space, collected.fitted)
    try:
        fitted = normalised(collected.fitted, color)
        lift = fit_procrustes(fitted, latent_patch=plan.latent_patch, color=color)
    except ValueError as error:
        raise UsageError(f"--images {plan.options.images}: {error}") from error
    figures = {"fitted": alignment(lift, fitted)}
    if collected.held_out.count:
        figures["held_out"] = alignment(lift, normalised(collected.held_out, color))
    lift.figures["alignment"] = figures
    return lift, figures


def color_choice(name: str) -> tuple[type[ColorSpace], ColorSpace | None]:
    """The colour space of a ``--color`` name, and it with the paper's constants where those are asked for.

    Raises:
        UsageError: if there is no such name.
    """
    choices: dict[str, tuple[type[ColorSpace], ColorSpace | None]] = {
        "oklab": (Oklab, None),
        "srgb": (SRGB, None),
        "oklab-paper": (Oklab, Oklab()),
    }
    if name not in choices:
        raise UsageError(f"--color {name}: unknown; choose {', '.join(choices)}")
    return choices[name]


@torch.no_grad()
def pictures(space: LatentSpace, source: ImageSource, lift: Lift, resolution: int, count: int = 8) -> list[Row]:
    """A few images of a source, their VAE reconstructions and their lift s A z."""
    stream = source.images(resolution, lift.patch_size)
    images = next(batches(islice(stream, count), count)).to(space.vae.device)
    height, width = images.shape[-2:]
    latents = space.encode(images)
    tokens = lift.raise_tokens(patchify(latents, lift.latent_patch))
    lifted = lift.color.decode(unpatchify(tokens, lift.patch_size, height, width))
    return [
        Row("Images: as they are", images),
        Row("VAE: encoded and decoded, what the latent model can show at best", space.decode(latents)),
        Row("Lift s A z: the latents carried into pixels by one rotation and one scale", lifted),
    ]


def open_latents(plan: Plan) -> LatentSpace:
    """The source's VAE, in float32 on the plan's device."""
    import diffusers

    vae_class = getattr(diffusers, plan.model.class_of("vae") or "")
    vae = vae_class.from_pretrained(plan.model.path, subfolder="vae", dtype=torch.float32)
    return LatentSpace(vae.to(plan.options.device).eval().requires_grad_(False))
