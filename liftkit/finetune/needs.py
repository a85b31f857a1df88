"""What a run takes: memory by part, disk and time; by an estimate, or by two steps that are timed here."""

from __future__ import annotations

import math
import time
from pathlib import Path

import torch

from liftkit.checkpoint.folder import tree_size
from liftkit.data.training import TrainingData
from liftkit.data.usable import Picture
from liftkit.finetune.encoders import load_vae
from liftkit.finetune.estimates import MEAN, OPTIMIZER, Estimate, estimate
from liftkit.finetune.memory import resident_memory
from liftkit.finetune.recipe import Recipe
from liftkit.finetune.run import make_accelerator
from liftkit.finetune.run_folder import RunFolder
from liftkit.finetune.sketch import Sketch
from liftkit.finetune.sources import token_side
from liftkit.finetune.trainee import Trainee, open_trainee
from liftkit.finetune.trainer import Trainer
from liftkit.progress import Observer, Silent
from liftkit.progress import size as _bytes

MEASURED = 2e13
"""Floating-point operations of a step up to which it is timed on a CPU; a step of tiny-klein has 4e11."""
GPU = 2e14
"""Operations a second of the GPU of an estimate, assumed. An H100 had 2.4e14 to 3.0e14 in steps of klein 4B's shape."""
CONTEXT = 700_000_000
"""Bytes that CUDA and its libraries take of a GPU beside tensors. Assumed, not measured."""

Rows = list[tuple[str, str]]


class Needs:
    """What a run takes.

    Args:
        recipe: what to do.
        sketch: of what it trains.
        trainee: the same as a network, with or without memory.
        data: training data, not prepared.
        pictures: what of it can be trained on.
    """

    def __init__(
        self, recipe: Recipe, sketch: Sketch, trainee: Trainee, data: TrainingData, pictures: list[Picture]
    ) -> None:
        self.recipe, self.trainee, self.data, self.count = recipe, trainee, data, len(pictures)
        self.sketch = sketch.beside({(each.size, len(each.references)) for each in pictures})
        self.side = token_side(trainee)
        areas = [math.prod(each.size) for each in pictures]
        self.tokens = round(sum(areas) / len(areas) / self.side**2)
        self.largest = max((each.size for each in pictures), key=math.prod)
        self.libraries = CONTEXT if self.on_gpu else resident_memory()

    @property
    def on_gpu(self) -> bool:
        """Whether the run is for a GPU: there is one, or a step is too much for a processor."""
        return torch.cuda.is_available() or self._operations > MEASURED

    @property
    def _operations(self) -> float:
        """Of a step, by the rule of thumb: two for each weight and token in each pass."""
        weights = sum(p.numel() for p in self.trainee.transformer.parameters())
        # Forward and backward of the student, half or all of the backward for weights that learn, and the reference's forward.
        passes = 6 if self.recipe.trainable.mode == "full" else 4
        passes += 2 if self.recipe.objective.loss == "asymflow" else 0
        return float(passes * weights * self.recipe.batch_size * self.tokens)

    @property
    def timed_here(self) -> bool:
        """Whether steps are timed on this machine, which takes all packages of the run; else their time is estimated."""
        return torch.cuda.is_available() or not self.on_gpu

    def estimate(self, recipe: Recipe) -> Estimate:
        """What steps of a recipe take, this run's or another one of the same model and data, with images of the largest size."""
        return estimate(recipe, self.sketch, self.largest, self.side, gpu=self.on_gpu)

    def total(self, found: Estimate) -> int:
        """Bytes of the device, its libraries' own among them."""
        return self.libraries + (found.total if self.on_gpu else found.resident)

    def memory_rows(self, found: Estimate) -> Rows:
        """Memory by part."""
        parts = {"libraries": self.libraries, **found.parts}
        if not self.on_gpu:
            parts |= {"kept by the allocator": found.kept, "waiting": found.host}
        where = "on a GPU" if self.on_gpu else "of this process"
        if not found.complete:
            beyond = f"activations of {self.sketch.spec.name} depend on values and cannot be estimated"
            return [("peak memory", f"at least {_bytes(self.total(found))} {where} ({_sum(parts)}); {beyond}")]
        rows = [("peak memory", f"about {_bytes(self.total(found))} {where}, estimated ({_sum(parts)})")]
        if self.on_gpu and found.host:
            rows.append(("host memory", f"{_bytes(found.host)} of what waits there until it is used"))
        return rows

    def disk_row(self, found: Estimate) -> tuple[str, str]:
        """Disk, with what the caches take."""
        recipe, trainee = self.recipe, self.trainee
        learns = sum(parameter.numel() for parameter in trainee.parameters.values())
        files = 4 * learns + found.parts[OPTIMIZER] + found.parts[MEAN]
        disk = {"checkpoints": (1 + recipe.checkpoints.keep) * files}
        if recipe.space == "latent" or recipe.objective.loss == "asymflow":
            lift, config = trainee.lift, trainee.transformer.config
            rank = lift.rank if lift is not None else trainee.spec.token_size(config)
            disk["cached latents"] = 2 * self.count * self.tokens * rank
        if recipe.save == "model":
            disk["the result"] = tree_size(trainee.folder.path)
        return "disk", f"{_bytes(sum(disk.values()))} ({_sum(disk)})"

    def time(self, found: Estimate, scratch: Path, observer: Observer, first: int) -> str:
        """How long the steps from ``first`` on take: by timing two of them here, or by a stated estimate."""
        steps = max(0, self.recipe.steps - first)
        operations = found.operations if found.complete else self._operations
        if not self.timed_here:
            return (
                f"not measured on this CPU; estimated at {operations / 1e12:,.0f} TFLOP a step, "
                f"{span(steps * operations / GPU)} on one GPU at an assumed {GPU / 1e12:.0f} TFLOPS"
            )
        trainer = self._trainer(scratch)
        batch = self.sketch.batch(self.recipe, trainer.trainee.transformer.config, self.data.sizes[0], self.side)
        seconds = math.inf
        with observer.stage("time two steps on random images", 2, "steps") as advance:
            for _ in range(2):
                began = time.monotonic()
                trainer.learner.learn(trainer.ahead(0, batch), 0)
                seconds = min(seconds, time.monotonic() - began)
                advance(1)
        device = trainer.accelerator.device
        peak = f", peak memory {_bytes(torch.cuda.max_memory_allocated(device))}" if device.type == "cuda" else ""
        about = f"about {span(steps * seconds)} for {steps} steps: {seconds:.2f} s a step"
        return f"{about}, measured here on {device.type}{peak}"

    def _trainer(self, scratch: Path) -> Trainer:
        """The run's own, with its weights."""
        recipe, folder = self.recipe, RunFolder(scratch)
        trainee = open_trainee(recipe, self.trainee.folder)
        vae = load_vae(trainee.folder) if recipe.objective.perceptual == "vae" else None
        return Trainer(recipe, trainee, self.data, None, vae, make_accelerator(recipe, folder), folder, Silent(), {})


def _sum(parts: dict[str, int]) -> str:
    return ", ".join(f"{name} {_bytes(count)}" for name, count in parts.items() if count)


def span(seconds: float) -> str:
    """A span of time in words."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds"
