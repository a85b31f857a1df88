"""One step's noise and loss. Everything random is a pure function of (seed, step), so that a resumed run, or one on more
processes, sees the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from liftkit.color import to_signed
from liftkit.data.batch import Batch
from liftkit.finetune.bands import BandError
from liftkit.finetune.borders import border_loss
from liftkit.finetune.network import Reference, bind
from liftkit.finetune.objective import Asked, Perceptual, Velocity, asymflow_loss, flow_loss, rows_to_ask
from liftkit.finetune.recipe import Noise, Recipe
from liftkit.finetune.terms import TERMS
from liftkit.lift import Lift
from liftkit.models.flow import FlowModel
from liftkit.tokens import patchify

STEP_STRIDE = 1_000_003
"""Seeds of steps are this far apart per seed of the run."""


def step_seed(seed: int, step: int) -> int:
    """The seed of one step's noise."""
    return (seed * STEP_STRIDE + step + 1) % (2**63)


def draw(shape: tuple[int, ...], recipe: Noise, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Noise and noise levels of the whole global batch, on the CPU.

    Args:
        shape: of the batch's states.
        recipe: the section ``noise``.

    Returns:
        Standard normal noise, shaped so, and sigma (B,): logit-normal, then shifted.
    """
    generator = torch.Generator().manual_seed(step_seed(seed, step))
    noise = torch.randn(shape, generator=generator)
    time = recipe.mean + recipe.std * torch.randn(shape[0], generator=generator)
    return noise, shifted(torch.sigmoid(time), recipe.shift)


def with_shift_of(lift: Lift | None, recipe: Recipe) -> Recipe:
    """The recipe with ``noise.shift`` as ``noise.latent_shift`` wants it: times the lift's scale s (Eq. 11-17), by which the
    pixel model sees the noise levels of the latent one; as it is in latent space."""
    noise = recipe.noise
    if noise.latent_shift is None:
        return recipe
    shift = noise.latent_shift * (lift.scale if lift is not None else 1.0)
    return recipe.model_copy(update={"noise": noise.model_copy(update={"shift": shift})})


def shifted(sigma: Tensor, shift: float) -> Tensor:
    """``shift sigma / (1 + (shift - 1) sigma)``."""
    return shift * sigma / (1.0 + (shift - 1.0) * sigma)


def quantile_levels(recipe: Noise, parts: int) -> Tensor:
    """The medians of equally likely parts of the training noise levels, rising, (parts,)."""
    middle = (torch.arange(parts) + 0.5) / parts
    return shifted(torch.sigmoid(recipe.mean + recipe.std * torch.special.ndtri(middle)), recipe.shift)


class Losses(NamedTuple):
    """What an objective computes of a batch.

    Args:
        student: the loss of the student, ().
        metrics: detached figures, () each.
        adversary: the loss of the discriminators, (), or None.
    """

    student: Tensor
    metrics: dict[str, Tensor]
    adversary: Tensor | None


@dataclass
class Objective:
    """The loss of a recipe on a batch.

    Args:
        recipe: says which.
        student: what learns.
        reference: the frozen converted model, for the loss asymflow.
        lift: A and s; None in latent space.
        perceptual: see :mod:`liftkit.finetune.perceptual`.
        adversary: adds its term where a recipe asks for one.
        repa: the same; see :mod:`liftkit.finetune.repa`.
        alone: whether this is the only process.
    """

    recipe: Recipe
    student: FlowModel
    reference: Reference | None
    lift: Lift | None
    perceptual: Perceptual | None = None
    adversary: Any = None
    repa: Any = None
    alone: bool = True

    def state(self, batch: Batch) -> Tensor:
        """What the student models: images in the color space, or latents."""
        if self.lift is not None:
            return self.lift.color.encode(batch.images)
        if batch.latents is None:
            raise ValueError("training in latent space needs latents")
        return batch.latents

    def conditioning(self, batch: Batch) -> dict[str, Any]:
        """What the student is given beside the state: prompts, and the images that those of the batch were made from."""
        references = batch.reference_latents if self.lift is None else batch.references
        if references is None:
            return batch.prompts
        if self.lift is not None:
            references = self.lift.color.encode(references.flatten(0, 1)).unflatten(0, references.shape[:2])
        return {**batch.prompts, "references": references}

    @staticmethod
    def latent_conditioning(batch: Batch) -> dict[str, Any]:
        """What the frozen model is given, which sees latents."""
        references = batch.reference_latents
        return batch.prompts if references is None else {**batch.prompts, "references": references}

    def rows_to_ask(self, levels: Sequence[float] | None) -> Asked | None:
        """The rows that the reference is asked for; None for all. A perceptual term wants it at every noise level, and by bands
        of the spectrum the loss has no bound that says how little it changes.

        Args:
            levels: noise levels of the rows, on the host; None where they are not known there.
        """
        choice = self.recipe.objective
        if levels is None or self.perceptual is not None or choice.bands is not None:
            return None
        rows = rows_to_ask(levels, choice.kappa, choice.reference_below)
        if len(rows) == len(levels):
            return None
        # Compiled blocks are made for one size of batch, and where the network is sharded all processes call it together.
        seen = list(range(len(levels))) if self.recipe.compile else rows or ([] if self.alone else [0])
        return Asked(rows, seen)

    def __call__(
        self, batch: Batch, x0: Tensor, noise: Tensor, sigma: Tensor, levels: Sequence[float] | None = None
    ) -> Losses:
        """Losses and metrics of a (micro) batch; see :func:`liftkit.finetune.objective.asymflow_loss`.

        Args:
            batch: the rows.
            x0, noise, sigma: their states, noise and noise levels.
            levels: the noise levels on the host, if they are known there; see :meth:`rows_to_ask`.
        """
        choice = self.recipe.objective
        student: Velocity = bind(self.student, self.conditioning(batch))
        if self.adversary is not None or choice.terms or choice.borders:
            student = recall = Recall(student)
        bands = None if choice.bands is None else BandError(**choice.bands.model_dump())
        common: dict[str, Any] = {"weight": choice.weight, "sigma_floor": choice.sigma_floor, "bands": bands}
        if choice.loss == "flow" or self.lift is None or self.reference is None or batch.latents is None:
            loss, metrics = flow_loss(student, x0, sigma, noise, **common)
        else:
            asked = self.rows_to_ask(levels)
            seen = batch if asked is None or not asked.seen else batch.pick(asked.seen)
            loss, metrics = asymflow_loss(
                student,
                bind(self.reference, self.latent_conditioning(seen)),
                x0,
                patchify(batch.latents, self.lift.latent_patch),
                sigma,
                noise,
                self.lift,
                kappa=choice.kappa,
                perceptual=self.perceptual,
                perceptual_weight=choice.perceptual_weight,
                asked=asked,
                **common,
            )
        if choice.borders and self.lift is not None:
            term = border_loss(x0 - recall.denoised, self.lift.patch_size)
            loss, metrics["borders"] = loss + choice.weight * choice.borders * term, term.detach()
        judged = None
        if self.adversary is not None and self.lift is not None:
            term, judged = self.adversary(to_signed(batch.images), self.lift.color.decode(recall.denoised), sigma)
            loss, metrics["adversarial"] = loss + choice.adversarial * term, term.detach()
        if self.repa is not None:
            term = self.repa(to_signed(batch.images))
            loss, metrics["repa"] = loss + choice.repa * term, term.detach()
        for name, weight in choice.terms.items():
            term = TERMS[name](recall.denoised, x0, sigma)
            loss, metrics[name] = loss + weight * term, term.detach()
        return Losses(loss, metrics, judged)


class Recall:
    """A velocity that remembers what it took the data for."""

    denoised: Tensor

    def __init__(self, velocity: Any) -> None:
        self.velocity = velocity

    def __call__(self, x_t: Tensor, sigma: Tensor) -> Tensor:
        """See :data:`liftkit.finetune.objective.Velocity`."""
        result: Tensor = self.velocity(x_t, sigma)
        self.denoised = x_t - sigma.view(-1, 1, 1, 1) * result.float()
        return result
