"""The sections of benchmarks/gpu.py about finetuning steps, beside the bare networks."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _gpu_model import (
    Flops,
    Scale,
    batches,
    compile_options,
    count_flops,
    device,
    fresh,
    latent_transformer,
    make_recipe,
    make_trainer,
    peak_gb,
    rate,
)
from _gpu_report import Add, Row, recorded
from finetune import floor, whole

from liftkit.finetune.network import compile_for_training

STEP_GOAL, MFU_GOAL = 1.02, 0.40


@dataclass(frozen=True)
class Variant:
    """A way to take steps.

    Args:
        compiled: the blocks are.
        checkpointing: of gradients.
        float8: the reference's products are in float8.
    """

    compiled: bool = False
    checkpointing: bool = False
    float8: bool = False

    def title(self, side: int) -> str:
        words = {"checkpointing": self.checkpointing, "compiled": self.compiled, "float8 reference": self.float8}
        return ", ".join([f"step at {side}", *(word for word, holds in words.items() if holds)])

    def changes(self) -> dict[str, Any]:
        """Of the recipe."""
        objective = {"objective": {"reference_precision": "float8"}} if self.float8 else {}
        return {"gradient_checkpointing": self.checkpointing, **objective}


VARIANTS = {
    "finetune": (Variant(), Variant(checkpointing=True)),
    "compiled": (
        Variant(compiled=True),
        Variant(compiled=True, float8=True),
        Variant(compiled=True, checkpointing=True),
    ),
}


def finetuning(section: str, scale: Scale, side: int, end: float, add: Add, variants: Sequence[Variant]) -> None:
    """Steps of a run beside the bare networks."""
    flops = count_flops(scale, side)
    latent = latent_transformer(scale, device())
    took = 0.0
    for variant in variants:
        if time.monotonic() + took > end:
            add(Row(section, variant.title(side), note="left out: no time"))
            continue
        begun = time.monotonic()
        with recorded(section, variant.title(side), add):
            _largest_batch(section, scale, side, latent, flops, variant, add)
        took = time.monotonic() - begun


def _largest_batch(
    section: str, scale: Scale, side: int, latent: Any, flops: Flops, variant: Variant, add: Add
) -> None:
    """Measure at the largest batch that fits, halving it where memory ends."""
    batch = scale.resolutions[side]
    while True:
        fresh()
        try:
            bare, eager, ours, ratio, peak, first = _steps(scale, side, batch, latent, variant)
        except torch.cuda.OutOfMemoryError:
            if batch == 1:
                raise
            batch //= 2
            continue
        except RuntimeError as error:
            raise RuntimeError(f"batch {batch}: {error}") from error
        break
    work, note, title = batch * flops.step, f"batch {batch}", variant.title(side)
    add(
        Row(
            section, f"floor of: {title}", ms=1000 * bare, images_per_second=batch / bare, **rate(work, bare), note=note
        )
    )
    measured: dict[str, Any] = {"ms": 1000 * ours, "images_per_second": batch / ours, "peak_gb": peak, "ratio": ratio}
    speed = rate(work, ours)
    met, goal = ratio <= STEP_GOAL, f"at most {STEP_GOAL}"
    if speed["mfu"] is not None:
        met, goal = met and speed["mfu"] >= MFU_GOAL, f"{goal}, MFU {MFU_GOAL:.0%}"
    note += (
        f"; first steps {first:.0f} s; {flops.step / 1e12:.3g} TFLOP an image, 6 N D would be {flops.rule / 1e12:.3g}"
    )
    if eager is not None:
        note += f"; {ours / eager:.3f} of the three passes as they are without compiling, {1000 * eager:.0f} ms"
    add(Row(section, title, **measured, **speed, goal=goal, met=met, note=note))


def _steps(
    scale: Scale, side: int, batch: int, latent: Any, variant: Variant
) -> tuple[float, float | None, float, float, float, float]:
    """Seconds of the floor, of the passes without compiling (None where there is no compiling) and of a step, the ratio of a step
    to the floor, the peak in GB, and seconds of the first steps."""
    with tempfile.TemporaryDirectory() as scratch:
        trainer = make_trainer(scale, latent, make_recipe(scale, Path(scratch) / "run", batch, **variant.changes()))
        trainer.learner.model.train()
        given = trainer.ahead.each(batches(scale, side, batch), 0)
        here = next(given).wait().batch
        eager = None
        if variant.compiled:
            if not variant.float8:
                eager = statistics.median(floor(trainer, here) for _ in range(3))
            compile_for_training(trainer.trainee.transformer, torch.device(device()), **compile_options())
        begun = time.monotonic()
        for _ in range(2):
            floor(trainer, here)
            whole(trainer, given)
        first = time.monotonic() - begun
        pairs = [(floor(trainer, here), whole(trainer, given)) for _ in range(scale.rounds)]
        bare, ours = (statistics.median(column) for column in zip(*pairs))
        return bare, eager, ours, statistics.median(b / a for a, b in pairs), peak_gb(), first
