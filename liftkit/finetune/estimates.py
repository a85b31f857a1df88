"""How much memory a step of a run takes, known before there is a model."""

from __future__ import annotations

import gc
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from liftkit.checkpoint.components import LATENT_VAE
from liftkit.finetune.ahead import Prepared
from liftkit.finetune.allocations import ACTIVATIONS, HOST, WORKING, Allocations
from liftkit.finetune.recipe import Recipe
from liftkit.finetune.run_folder import RunFolder
from liftkit.finetune.sketch import Sketch, placed, without_memory
from liftkit.finetune.stand_ins import JudgesAll, LpipsShaped
from liftkit.finetune.step import draw
from liftkit.finetune.terms import make_perceptual
from liftkit.models.load import load_component

if TYPE_CHECKING:
    from liftkit.finetune.learner import Learner

WEIGHTS, GRADIENTS, OPTIMIZER, MEAN = "weights", "gradients", "optimizer", "running mean"
REFERENCE, BATCHES = "reference pass", "batches"
PARTS = (WEIGHTS, GRADIENTS, OPTIMIZER, MEAN, BATCHES, ACTIVATIONS, REFERENCE, WORKING)
EIGHT_BIT_FROM, EIGHT_BIT_BLOCK = 4096, 256
"""bitsandbytes' optimizers keep tensors of fewer numbers in float32, and one scale for each block of those of more."""

KEPT = 0.5
"""Of what comes and goes in a step, the share that glibc's allocator keeps beside what is in use; see docs/benchmarks.md."""


@dataclass(frozen=True)
class Estimate:
    """What a step of a run takes.

    Args:
        parts: bytes by part, of :data:`PARTS`, when most are in use.
        host: bytes in host memory that come to the device when they are used: weights of blocks, batches that are taken in parts.
        operations: floating-point operations of matrix products and attention in a step, with those that are done again.
        complete: whether activations are known; they are not where a forward's shapes depend on values, as a router's do.
    """

    parts: dict[str, int]
    host: int
    operations: float
    complete: bool = True

    @property
    def total(self) -> int:
        """Bytes in use at once, without the libraries' own."""
        return sum(self.parts.values())

    @property
    def kept(self) -> int:
        """Bytes that the C library's allocator keeps of what comes and goes; see :data:`KEPT`."""
        return int(KEPT * sum(self.parts[part] for part in (ACTIVATIONS, REFERENCE, WORKING)))

    @property
    def resident(self) -> int:
        """Bytes of a process that trains on a CPU, beside its libraries: host memory is no other."""
        return self.total + self.host + self.kept


def estimate(recipe: Recipe, sketch: Sketch, size: tuple[int, int], side: int, *, gpu: bool = False) -> Estimate:
    """What a run's steps take, found by taking one of them with tensors that have no memory.

    The network, the loss, autograd and the optimizer are the run's own; every tensor that they make is counted. What kernels
    allocate within an operation is not seen, and neither is what an allocator keeps of what was given back.

    Args:
        recipe: what to do; as a single process.
        sketch: of what it trains.
        size: height and width of the images.
        side: pixels along a token.
        gpu: whether it will run on one, where some operations keep less.

    Raises:
        UsageError: if the recipe names modules that are not there.
    """
    seen, asked = Allocations(), recipe.batch_size
    micro = min(recipe.micro_batch or asked, asked)
    # Micro batches after the first take what that does, beside the gradients that are there.
    recipe = recipe.model_copy(update={"batch_size": micro})
    transformer = sketch.transformer(recipe)
    # A detail head finds its images by the values of position ids, of which there are none here: they are all tokens.
    grid = 1, size[0] // side, size[1] // side
    transformer.architecture = replace(sketch.spec, token_grid=lambda _: grid, clean_tokens=lambda _: None)
    # Where tensors have no memory, not even one of the meta device can be read from a file.
    vae = (
        load_component(sketch.folder, LATENT_VAE, torch.float32, "meta")
        if recipe.objective.perceptual == "vae"
        else None
    )
    with without_memory(gpu), seen:
        learner = _learner(recipe, sketch, transformer, seen, vae)
        config = learner.trainee.transformer.config
        with seen.part(BATCHES):
            batch = sketch.batch(recipe, config, size, side)
            states = batch.images if sketch.lift is not None else batch.latents
            assert states is not None
            # Without levels on the host the reference is asked about every row: at most so much is needed.
            prepared = Prepared(batch, *draw(tuple(states.shape), recipe.noise, recipe.seed, 0))
        del batch, states
        complete = True
        try:
            parts = _step(learner, prepared, seen, recipe.optimizer.name, micro < asked)
        except (DataDependentOutputException, DynamicOutputShapeException, NotImplementedError):
            # The last is of older versions of torch, for tables that a network has on the meta device.
            complete, parts = False, _staying(learner, seen, recipe.optimizer.name)
        parts[BATCHES], waiting = seen.live[BATCHES], seen.live[HOST]
        # One is made ready while another is learned from; whole on the device, unless a step takes its rows in parts.
        if micro == asked:
            parts[BATCHES] *= 2
        else:
            waiting += 2 * seen.live[BATCHES] * asked // micro
        result = Estimate(parts, waiting, asked / micro * seen.operations, complete)
        del learner, prepared
    gc.collect()
    return result


def _step(learner: Learner, prepared: Prepared, seen: Allocations, optimizer: str, again: bool) -> dict[str, int]:
    """Bytes by part at the peak of a step that is not the first, found by taking one.

    Args:
        optimizer: its name; the learner's own is exact where this one has 8 bits.
        again: whether the step has further micro batches.
    """
    learner.model.train()
    # The first one makes what stays, such as the reference's view of the network.
    learner.gradients(prepared)
    learner.forget_gradients()
    gc.collect()
    seen.forget_peak()
    seen.operations = 0.0
    learner.gradients(prepared)
    learner.clip(0)
    learning, gradients = dict(seen.peak), seen.live[GRADIENTS]
    seen.forget_peak()
    state = _state(learner, seen, optimizer)
    # The state was there at the first step's end alone, and made as working space.
    updating = {**seen.peak, WORKING: max(seen.peak.get(WORKING, 0) - state, 0)}
    if again:
        learning[GRADIENTS] = gradients
    most = max(learning, updating, key=lambda parts: sum(parts.get(part, 0) for part in PARTS))
    return {part: most.get(part, 0) for part in PARTS} | {OPTIMIZER: state}


def _state(learner: Learner, seen: Allocations, optimizer: str) -> int:
    """Bytes of the optimizer's state, which a step of its own makes."""
    if optimizer == "adamw8bit":
        return sum(map(_eight_bits, learner.parameters.values()))
    before = sum(seen.live.values())
    for each in learner.bare:
        each.step()
    return sum(seen.live.values()) - before


def _staying(learner: Learner, seen: Allocations, optimizer: str) -> dict[str, int]:
    """Bytes by part of what stays between steps, and of gradients."""
    learner.forget_gradients()
    gc.collect()
    with seen.part(GRADIENTS):
        for parameter in learner.parameters.values():
            parameter.grad = torch.empty_like(parameter)
    parts = {part: seen.live.get(part, 0) for part in (WEIGHTS, GRADIENTS, MEAN)}
    return dict.fromkeys(PARTS, 0) | parts | {OPTIMIZER: _state(learner, seen, optimizer)}


def _learner(recipe: Recipe, sketch: Sketch, transformer: Any, seen: Allocations, vae: Any) -> Learner:
    """A run's own around tensors without memory."""
    from liftkit.finetune.learner import Learner
    from liftkit.finetune.run import make_accelerator

    known = recipe.model_copy(
        update={
            # What eight bits take is known without the package.
            "optimizer": recipe.optimizer.model_copy(update={"name": recipe.optimizer.name.removesuffix("8bit")}),
            # Encoders and features of other networks would have to be fetched.
            "objective": recipe.objective.model_copy(update={"repa": 0.0, "perceptual": "none"}),
            "trackers": (),
            "compile": False,
        }
    )
    folder = RunFolder(recipe.output)
    accelerator = make_accelerator(known, folder, cpu=True)
    with seen.part(WEIGHTS):
        trainee = sketch.trainee(known, transformer)
        learner = Learner(known, trainee, None, accelerator)
        learner.objective.perceptual = _perceptual(recipe.objective.perceptual, vae)
        if learner.objective.adversary is not None:
            learner.objective.adversary = JudgesAll(learner.objective.adversary)
    gc.collect()
    seen.assign(HOST, (each for offload in learner.offloads for block in offload.host for each in block))
    if learner.average is not None:
        seen.assign(MEAN, learner.average.values.values())

    def gradient(parameter: Tensor) -> None:
        seen.assign(GRADIENTS, [parameter.grad] if parameter.grad is not None else [])

    for parameter in learner.parameters.values():
        parameter.register_post_accumulate_grad_hook(gradient)
    reference = learner.objective.reference
    if reference is not None:
        inner = reference.velocity

        def velocity(*given: Any, **named: Any) -> Tensor:
            with seen.part(REFERENCE):
                return inner(*given, **named)

        reference.velocity = velocity  # type: ignore[method-assign]
    return learner


def _perceptual(name: str, vae: Any) -> Any:
    """What compares images, without its weights."""
    if name == "lpips":
        return LpipsShaped()
    return make_perceptual(name, None if vae is None else placed(vae), "cpu")


def _eight_bits(parameter: Tensor) -> int:
    """Bytes of the two moments of bitsandbytes' 8-bit AdamW."""
    numbers = parameter.numel()
    if numbers < EIGHT_BIT_FROM:
        return 8 * numbers
    return 2 * (numbers + 4 * -(-numbers // EIGHT_BIT_BLOCK) + 4 * 256)
