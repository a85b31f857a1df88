"""What can be chosen for a model, read off its folder: its pipeline's arguments, its transformer's class, its scheduler's."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from math import lcm
from typing import Any

from liftkit.evaluate.entries import Entry
from liftkit.models.registry import architecture
from liftkit.models.vaes import vae_geometry

CAN = ("negative", "guidance", "clamp", "clamped", "references")
"""What a model can or cannot do."""


@dataclass(frozen=True)
class Abilities:
    """What a model can do, and its own choices.

    Args:
        negative: takes a negative prompt.
        guidance: guides by a scale.
        clamp: paints colors, which can be kept within sRGB at every step.
        clamped: does so unless asked.
        references: number of reference images that it takes at most.
        side: of a token in pixels; heights and widths are multiples.
        size: side of the images that it was made for, in pixels.
        steps: its pipeline's own number of steps.
        scale: its pipeline's own guidance scale; 1 without guidance.
    """

    negative: bool
    guidance: bool
    clamp: bool
    clamped: bool
    references: int
    side: int
    size: int
    steps: int
    scale: float

    def with_(self, other: Abilities) -> Abilities:
        """What either can do, with this one's own choices; sides are multiples of both tokens."""
        either = {name: max(getattr(self, name), getattr(other, name)) for name in CAN}
        return replace(self, **either, side=lcm(self.side, other.side))


def abilities(entry: Entry) -> Abilities:
    """What a model can do; nothing of it is loaded."""
    folder = entry.folder
    spec = architecture(folder.class_of("transformer") or "")
    takes = _arguments(str(folder.index["_class_name"]))
    distilled = folder.index.get("is_distilled") not in (None, False)
    guides = spec.guidance_argument in takes and not distilled
    steps, scale = takes.get("num_inference_steps"), takes.get(spec.guidance_argument)
    return Abilities(
        negative="negative_prompt" in takes or ("negative_prompt_embeds" in takes and not distilled),
        guidance=guides,
        clamp=entry.lift is not None,
        clamped=folder.config("scheduler").get("clamp") is not None,
        references=spec.references.get(str(folder.index["_class_name"]), range(1))[-1],
        side=entry.lift.patch_size if entry.lift is not None else _token_side(entry),
        size=entry.size,
        steps=steps if isinstance(steps, int) else 28,
        scale=float(scale) if guides and isinstance(scale, int | float) else 1.0,
    )


def _token_side(entry: Entry) -> int:
    """Of a latent model's token, in pixels."""
    config = entry.folder.config("transformer")
    factor, _ = vae_geometry(entry.folder.config("vae"))
    return factor * architecture(config["_class_name"]).latent_patch(config)


def _arguments(pipeline: str) -> dict[str, Any]:
    """The arguments of a pipeline's call with their defaults."""
    import diffusers

    call = inspect.signature(getattr(diffusers, pipeline).__call__)
    return {name: each.default for name, each in call.parameters.items()}
