"""How fast a run is: seconds of its steps, and the operations in one."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from liftkit.data.batch import Batch
from liftkit.finetune.recipe import Recipe
from liftkit.finetune.step import Objective


@dataclass
class Speed:
    """Seconds of steps, without what happens between them.

    Args:
        steps: taken in this session.
        seconds: that they took.
        flops: floating-point operations of one step, from :func:`count_flops`; 0 where they were not counted.
        recent: seconds of each of the last steps.
    """

    steps: int = 0
    seconds: float = 0.0
    flops: float = 0.0
    recent: list[float] = field(default_factory=list)

    def add(self, seconds: float) -> None:
        """One more step, and the seconds that it took."""
        self.steps, self.seconds = self.steps + 1, self.seconds + seconds
        self.recent = [*self.recent[-19:], seconds]

    @property
    def per_step(self) -> float:
        """Mean seconds of the last steps; 0 before the first."""
        return sum(self.recent) / max(len(self.recent), 1)


@torch.no_grad()
def count_flops(objective: Objective, one: Batch, recipe: Recipe) -> float:
    """Operations of a step, from one image's forward: a backward costs as much again, twice that where all weights learn.

    Not within a step: counting makes torch take other kernels, which round otherwise.

    Args:
        objective: with the student and its reference.
        one: a batch of one image, on their device.
        recipe: says how many there are in a step, and how much learns.
    """
    from torch.utils.flop_counter import FlopCounterMode

    x_t = objective.state(one)
    sigma = torch.full((1,), 0.5, device=x_t.device)
    counts = []
    seen = (objective.student, objective.conditioning(one)), (objective.reference, objective.latent_conditioning(one))
    for model, given in seen:
        with FlopCounterMode(display=False) as counter:
            if model is not None:
                model.velocity(x_t, sigma, **given)
        counts.append(counter.get_total_flops())
    backward = 2 if recipe.trainable.mode == "full" else 1
    return float(recipe.batch_size * ((1 + backward) * counts[0] + counts[1]))
