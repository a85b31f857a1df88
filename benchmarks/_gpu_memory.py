"""The section of benchmarks/gpu.py about memory: what a step takes with each way to hold the frozen base, beside its estimate."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _gpu_model import (
    Scale,
    batches,
    device,
    fresh,
    latent_transformer,
    make_recipe,
    make_trainer,
    random_lift,
    timed,
    without_weights,
)
from _gpu_report import Row, recorded

from liftkit.checkpoint.model import ModelFolder
from liftkit.finetune.estimates import estimate
from liftkit.finetune.memory import peak_memory
from liftkit.finetune.recipe import Recipe
from liftkit.finetune.sketch import Sketch
from liftkit.models.families.flux2 import FLUX2

BASES: dict[str, dict[str, str]] = {
    "bfloat16": {},
    "int8": {"quantize": "int8"},
    "nf4": {"quantize": "nf4"},
    "offload: blocks": {"offload": "blocks"},
}
STEPS, BOUND = 3, 0.15


def memory(scale: Scale, end: float, add: Callable[[Row], None]) -> None:
    """Steps of one image at the largest side with gradient checkpointing: milliseconds, the peak, and how far the estimate is off.

    Args:
        scale: how large the model is.
        end: when there is no more time, as ``time.monotonic`` counts.
        add: takes each row.
    """
    side, took = max(scale.resolutions), 0.0
    for name, base in BASES.items():
        what = f"step at {side}, base {name}"
        if time.monotonic() + took > end:
            add(Row("memory", what, note="left out: no time"))
            continue
        fresh()
        begun = time.monotonic()
        with recorded("memory", what, add), tempfile.TemporaryDirectory() as scratch:
            recipe = make_recipe(scale, Path(scratch) / "run", 1, gradient_checkpointing=True, base=base)
            guess = estimate(recipe, _sketch(scale), (side, side), scale.patch)
            seconds, peak = _measured(scale, side, recipe)
            measured: dict[str, Any] = {"ms": 1000 * seconds, "images_per_second": 1 / seconds, "peak_gb": peak / 1e9}
            if torch.cuda.is_available():
                # Of a process on a CPU the libraries are a part that no estimate of this section has.
                measured |= {"ratio": guess.total / peak, "met": abs(guess.total / peak - 1) <= BOUND}
            note = f"batch 1; estimated {guess.total / 1e9:.3g} GB and {guess.host / 1e9:.3g} GB of the host's"
            add(Row("memory", what, **measured, goal=f"estimated / measured within {BOUND:.0%} of 1", note=note))
        took = time.monotonic() - begun


def _measured(scale: Scale, side: int, recipe: Recipe) -> tuple[float, int]:
    """Seconds of the last step, and the peak of all in bytes."""
    where = torch.device("cpu") if recipe.base.offload != "none" else device()
    trainer = make_trainer(scale, latent_transformer(scale, where), recipe)
    given = trainer.ahead.each(batches(scale, side, 1), 0)
    trainer.learner.model.train()
    for step in range(STEPS):
        prepared = next(given).wait()
        seconds = timed(lambda prepared=prepared, step=step: trainer.learner.learn(prepared, step))
    return seconds, peak_memory(device())


def _sketch(scale: Scale) -> Sketch:
    """The same model without its weights."""
    lift = random_lift(scale)
    stock, twin = without_weights(scale, lift)
    folder = ModelFolder(Path("random"), "random", {})
    return Sketch(folder, FLUX2, lambda dtype: copy.deepcopy(twin).to(dtype), lift, stock.state_dict(), scale.text)
