"""The section of benchmarks/gpu.py about memory: what a step takes with each way to hold the frozen base, beside its estimate."""

from __future__ import annotations

import copy
import tempfile
import time
from dataclasses import replace
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
from _gpu_report import Add, Row, recorded
from convert import KLEIN_9B

from liftkit.checkpoint.model import ModelFolder
from liftkit.finetune.estimates import estimate
from liftkit.finetune.memory import peak_memory
from liftkit.finetune.recipe import Recipe
from liftkit.finetune.sketch import Sketch
from liftkit.finetune.stand_ins import LpipsShaped
from liftkit.finetune.terms import PERCEPTUAL
from liftkit.models.families.flux2 import FLUX2

Keys = dict[str, Any]

BASES: dict[str, Keys] = {
    "bfloat16": {},
    "int8": {"base": {"quantize": "int8"}},
    "nf4": {"base": {"quantize": "nf4"}},
    "offload: blocks": {"base": {"offload": "blocks"}},
    "bfloat16, 8-bit Adam": {"optimizer": {"name": "adamw8bit"}},
    "bfloat16, float8 reference": {"objective": {"reference_precision": "float8"}},
}
CARD: dict[str, Keys] = {
    "int8, micro batches of 2": {"base": {"quantize": "int8"}, "micro_batch": 2},
    "nf4, micro batches of 2": {"base": {"quantize": "nf4"}, "micro_batch": 2},
    "offload: blocks, micro batches of 1": {"base": {"offload": "blocks"}, "micro_batch": 1},
}
"""Ways in which a model of klein 9B's shape is to learn on a card of 24 GB, with LPIPS as in its recipe."""
CARD_BYTES, CONTEXT = 24_000_000_000, 700_000_000
STEPS, BOUND = 3, 0.15


def memory(scale: Scale, end: float, add: Add) -> None:
    """Steps of one image at the largest side with gradient checkpointing: milliseconds, the peak, and how far the estimate is off.

    Args:
        scale: how large the model is.
        end: when there is no more time, as ``time.monotonic`` counts.
        add: takes each row.
    """
    latent = latent_transformer(scale, torch.device("cpu"))
    _rows("memory", scale, latent, BASES, end, add)


def memory_9b(scale: Scale, end: float, add: Add) -> None:
    """Steps of a model of klein 9B's shape in memory limited to 24 GB, by its recipe, but for a batch of four.

    LPIPS has random weights, which takes no other memory.

    Args:
        scale: how large all else is.
        end, add: see :func:`memory`.
    """
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((CARD_BYTES - CONTEXT) / total)
        scale = replace(scale, config=KLEIN_9B)
    PERCEPTUAL["lpips"] = lambda vae, where: _LpipsOn(where)
    common: Keys = {"batch_size": 4, "optimizer": {"name": "adamw8bit"}, "objective": {"perceptual": "lpips"}}
    ways = {name: {**common, **keys} for name, keys in CARD.items()}
    _rows("memory-9b", scale, latent_transformer(scale, torch.device("cpu")), ways, end, add)


class _LpipsOn(LpipsShaped):
    """LPIPS of random weights on a device."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.stages = [[layer.to(where) for layer in stage] for stage in self.stages]


def _rows(section: str, scale: Scale, latent: Any, ways: dict[str, Keys], end: float, add: Add) -> None:
    side, took = max(scale.resolutions), 0.0
    for name, keys in ways.items():
        what = f"step at {side}, base {name}"
        if time.monotonic() + took > end:
            add(Row(section, what, note="left out: no time"))
            continue
        fresh()
        begun = time.monotonic()
        with recorded(section, what, add), tempfile.TemporaryDirectory() as scratch:
            changes = {"batch_size": 1, "gradient_checkpointing": True, **keys}
            recipe = make_recipe(scale, Path(scratch) / "run", changes.pop("batch_size"), **changes)
            guess = estimate(recipe, _sketch(scale), (side, side), scale.patch, gpu=torch.cuda.is_available())
            seconds, peak = _measured(scale, side, recipe, latent)
            count = recipe.batch_size
            measured: Keys = {"ms": 1000 * seconds, "images_per_second": count / seconds, "peak_gb": peak / 1e9}
            if torch.cuda.is_available():
                # Of a process on a CPU the libraries are a part that no estimate of this section has.
                measured |= {"ratio": guess.total / peak, "met": abs(guess.total / peak - 1) <= BOUND}
            note = f"batch {count}; estimated {guess.total / 1e9:.3g} GB and {guess.host / 1e9:.3g} GB of the host's"
            add(Row(section, what, **measured, goal=f"estimated / measured within {BOUND:.0%} of 1", note=note))
        took = time.monotonic() - begun


def _measured(scale: Scale, side: int, recipe: Recipe, latent: Any) -> tuple[float, int]:
    """Seconds of the last step, and the peak of all in bytes. As in a run, what is not quantized comes to the device last."""
    trainer = make_trainer(scale, copy.deepcopy(latent), recipe)
    given = trainer.ahead.each(batches(scale, side, recipe.batch_size), 0)
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
