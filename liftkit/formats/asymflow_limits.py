"""What the authors' format of adapters can hold, and what it cannot."""

from __future__ import annotations

from collections.abc import Sequence

from liftkit.color import ColorSpace, Oklab
from liftkit.errors import UsageError
from liftkit.lift import Lift
from liftkit.models.adapter import Adapter
from liftkit.models.detail_head import HEAD
from liftkit.models.families.flux2 import FLUX2

NAME = "asymflow-adapter"
CLASS = FLUX2.lifted_name
INPUT, OUTPUT = (f"{projection.path}.weight" for projection, _ in FLUX2.projections)
NORM = "norm_out.linear.weight"
FULL = (INPUT, OUTPUT, NORM)
COMFYUI = frozenset(
    [
        f"transformer_blocks.{n}.{part}.linear_{way}"
        for n in range(8)
        for part in ("ff", "ff_context")
        for way in ("in", "out")
    ]
    + [f"single_transformer_blocks.{n}.attn.to_out" for n in range(24)]
    + [f"time_guidance_embed.timestep_embedder.linear_{n}" for n in (1, 2)]
)
WITHOUT_HEAD = "train without trainable.head"


def unknown_to_comfyui(adapter: Adapter) -> list[str]:
    """LoRA targets that the strict of the ComfyUI ports refuses: it knows 58 modules by name, those of AsymFLUX.2 klein 9B."""
    return [module for module in adapter.pairs if module not in COMFYUI]


def color_problem(color: ColorSpace | None) -> str:
    """Why the format cannot hold a conversion in a color space (None: one that is fitted); empty if it can."""
    if color == Oklab():
        return ""
    return (
        f"it means {Oklab()}, this lift {color or 'colors that are fitted to the images'}; their pipeline would paint wrong "
        "colors; convert with --color oklab-paper"
    )


def export_problem(transformer: str, color: ColorSpace, full: Sequence[str]) -> str:
    """Why what a recipe trains could not be exported in this format; empty if it can.

    Args:
        transformer: class of the folder's transformer.
        color: of its lift.
        full: paths of the modules that are trained in full; ``""`` is the whole network.
    """
    if transformer != CLASS:
        return f"it holds adapters for {CLASS}"
    known = (INPUT.removesuffix(".weight"), OUTPUT.removesuffix(".weight"), "norm_out")
    if HEAD in full:
        return f"it has no place for a detail head; {WITHOUT_HEAD}"
    other = [path for path in full if path.split(".")[0] not in known]
    if other:
        return f"it has no place for {other[0] or 'a network'} trained in full; train with LoRA"
    return color_problem(color)


def check_exportable(adapter: Adapter) -> Lift:
    """The lift of an adapter; raise unless the format has a place for all that it holds.

    Raises:
        UsageError: naming what does not fit.
    """
    lift = adapter.lift
    if lift is None or adapter.transformer != CLASS:
        raise UsageError(f"--format {NAME}: it holds pixel adapters for {CLASS}, this one is for {adapter.transformer}")
    if adapter.head is not None:
        raise UsageError(
            f"--format {NAME}: it has no place for a detail head, without which this would paint other images; export to "
            f"--format adapter, or {WITHOUT_HEAD}"
        )
    problem = color_problem(lift.color)
    if problem:
        raise UsageError(f"--format {NAME}: {problem}")
    missing = [name for name in FULL if name not in adapter.full]
    if missing:
        raise UsageError(f"--format {NAME}: it holds {missing[0]}, the adapter does not: give --base, the latent model")
    norm = NORM.removesuffix("linear.weight")
    other = [name for name in adapter.full if name not in FULL and not name.startswith(norm)]
    if other:
        raise UsageError(
            f"--format {NAME}: it has no place for {len(other)} tensors trained in full, such as {other[0]!r}; train them "
            "with LoRA"
        )
    return lift
