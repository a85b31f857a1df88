"""The network that learns, and one optimizer step on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from liftkit.errors import LiftkitError
from liftkit.finetune.adversary import Adversary
from liftkit.finetune.ahead import Prepared
from liftkit.finetune.latent_view import adapters_of
from liftkit.finetune.network import Reference, compile_for_training, connect
from liftkit.finetune.offload import BlockOffload, offload_blocks
from liftkit.finetune.optimizer import Average, make_optimizers, rate_factor, set_rate, step_scaled
from liftkit.finetune.recipe import Recipe
from liftkit.finetune.repa import Repa, load_encoder
from liftkit.finetune.resume import Resumption
from liftkit.finetune.run_folder import RunFolder
from liftkit.finetune.sharding import keep_apart, set_sharding, share_gradients
from liftkit.finetune.stages import drop_gradients, trunk_of
from liftkit.finetune.state import (
    checkpoints,
    load_optimizers,
    load_parameters,
    optimizer_tensors,
    read_checkpoint,
    whole,
)
from liftkit.finetune.step import Objective, step_seed
from liftkit.finetune.terms import make_perceptual
from liftkit.finetune.trainee import COMPUTE, Trainee
from liftkit.models.broken import first_not_finite


class Learner:
    """A wrapped network with its objective, its optimizers and the running mean of its weights.

    Args:
        recipe: what to do.
        trainee: the network; see :func:`liftkit.finetune.trainee.open_trainee`.
        vae: the checkpoint's own, where a perceptual term looks through it.
        accelerator: of accelerate.
    """

    def __init__(self, recipe: Recipe, trainee: Trainee, vae: Any, accelerator: Any) -> None:
        self.recipe, self.trainee, self.accelerator = recipe, trainee, accelerator
        optimizers = make_optimizers(trainee.parameters, recipe.optimizer, trainee.spec)
        self.offloads: list[BlockOffload] = []
        if recipe.base.offload == "blocks":
            # Before the network goes to the device, which need not hold it.
            models = [trainee.transformer] if recipe.trainable.mode != "full" else []
            frozen = trainee.network.frozen
            self.offloads = offload_blocks([*models, *([frozen] if frozen is not None else [])], accelerator.device)
        if recipe.compile:
            compile_for_training(trainee.transformer, accelerator.device)
        for layer in adapters_of(trainee.transformer):
            # Autocast brings states to the precision of products, and on the way they need not be float32. A processor's dropout
            # would round its factor to that precision.
            layer.cast_input_dtype_enabled = accelerator.device.type == "cpu"
        set_sharding(accelerator, trainee.transformer, COMPUTE[recipe.precision])
        self.head = list(trainee.head.parameters()) if trainee.head is not None else []
        if trainee.head is not None:
            keep_apart(trainee.network, trainee.head)
        self.model, *self.optimizers = accelerator.prepare(trainee.network, *optimizers)
        self.bare = [getattr(each, "optimizer", each) for each in self.optimizers]
        # Sharding may have put other tensors in the places of parameters.
        self.parameters: dict[str, nn.Parameter] = trainee.parameters
        self.average = Average(self.parameters, recipe.ema) if recipe.ema.enabled else None
        self.objective = self._objective(vae)
        self.rate: Callable[[int], float] = lambda step: rate_factor(recipe.optimizer, step, recipe.steps)
        """The factor of the learning rate in a step."""

    def _objective(self, vae: Any) -> Objective:
        recipe, trainee, device = self.recipe, self.trainee, self.accelerator.device
        student, latent = connect(trainee.transformer, self.model)
        lift = trainee.lift
        if lift is not None:
            lift = lift.to(device)
        asymmetric = recipe.objective.loss == "asymflow"
        reference = Reference(latent, lift) if asymmetric and latent is not None and lift is not None else None
        adversary = Adversary(recipe, device) if recipe.objective.adversarial else None
        perceptual = make_perceptual(recipe.objective.perceptual, vae, str(device))
        repa = None
        if recipe.objective.repa:
            repa = Repa(trainee.transformer, load_encoder(recipe.objective.repa_encoder), recipe.objective.repa_block)
        alone = self.accelerator.num_processes == 1
        return Objective(recipe, student, reference, lift, perceptual, adversary, repa, alone)

    # -- one step ---------------------------------------------------------------------------------------------------

    def learn(self, prepared: Prepared, step: int) -> dict[str, Any]:
        """One optimizer step on a batch; its figures.

        In fp16 gradients may overflow; the step is then taken again with a smaller scale, so that no step is left out.

        Args:
            prepared: the batch, its noise and noise levels.
            step: steps done before.

        Raises:
            LiftkitError: if loss or gradients are not finite; the weights are as they were.
        """
        prepared = prepared.wait()
        if not self.model.training:
            self.model.train()
        set_rate(self.bare, self.rate(step))
        while True:
            # For dropout; noise has generators of its own.
            torch.manual_seed(step_seed(self.recipe.seed, step) + self.accelerator.process_index)
            metrics = self.gradients(prepared)
            row = self._row(step, metrics, self.clip(step))
            if step_scaled(self.optimizers, self.accelerator.scaler, row["gradient_norm"]):
                break
            self.forget_gradients()
        if self.objective.adversary is not None:
            self.objective.adversary.step(self.rate(step), self.accelerator)
        self.forget_gradients()
        if self.average is not None:
            self.average.update(self.parameters, step + 1)
        return row

    def forget_gradients(self) -> None:
        """Gradients that are no longer needed go."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        if self.objective.adversary is not None:
            self.objective.adversary.optimizer.zero_grad(set_to_none=True)

    def gradients(self, prepared: Prepared) -> dict[str, Tensor]:
        """Gradients of this process's rows, in micro batches; the mean metrics."""
        device, rows = self.accelerator.device, len(prepared.sigma)
        size = min(self.recipe.micro_batch or rows, rows)
        total: dict[str, Tensor] = {}
        for start in range(0, rows, size):
            # They may still be in host memory, where a large batch is of no use to a small forward.
            batch, noise, sigma = prepared.part(slice(start, start + size), device)
            last = start + size >= rows
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                levels = prepared.levels and prepared.levels[start : start + size]
                found = self.objective(batch, self.objective.state(batch), noise, sigma, levels)
                share = len(sigma) / rows
                self.accelerator.backward(found.student * share)
                if found.adversary is not None:
                    found.adversary.backward()
            for name, value in {"loss": found.student.detach(), **found.metrics}.items():
                total[name] = total.get(name, torch.zeros((), device=device)) + share * value.float()
        share_gradients(self.accelerator, self.head)
        return total

    def clip(self, step: int) -> Tensor:
        """Clip the gradients; their norm before, (). A trunk that is held has none."""
        trunk = self.recipe.optimizer.trunk
        if trunk is not None and step < trunk.start:
            drop_gradients(trunk_of(self.trainee.spec, self.parameters).values())
        for parameter in self.parameters.values():
            # A layout that a checkpoint keeps: optimizer state is laid out as the first gradient was, and rounds by layout.
            if parameter.grad is not None and not parameter.grad.is_contiguous():
                parameter.grad = parameter.grad.contiguous()
        limit = self.recipe.optimizer.clip
        norm = self.accelerator.clip_grad_norm_(
            list(self.parameters.values()), limit if limit is not None else math.inf
        )
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def _row(self, step: int, metrics: dict[str, Tensor], norm: Tensor) -> dict[str, Any]:
        """The figures of a step, before its weights change; the run stops where they must not.

        Raises:
            LiftkitError: if loss or gradients are not finite. In fp16 gradients may overflow: see :func:`step_scaled`.
        """
        names = [*sorted(metrics), "gradient_norm"]
        # All at once: each look at a number waits for the device. It is the only one in a step.
        here = torch.stack([*(metrics[name] for name in names[:-1]), norm.float()])
        values = self.accelerator.reduce(here, "mean").tolist()
        row: dict[str, Any] = {"step": step + 1, **dict(zip(names, values))}
        for what, value in (("loss", row["loss"]), ("gradient's norm", row["gradient_norm"])):
            if math.isfinite(value) or (what != "loss" and self.accelerator.scaler is not None):
                continue
            found = checkpoints(RunFolder(self.recipe.output).checkpoints)
            last = f"the last good checkpoint is {found[-1][1]}" if found else "there is no checkpoint yet"
            # The weights are as the last step left them: what is not finite in them came from the model's files.
            advice = self.broken_tensor() or "try a lower optimizer.learning_rate or clip"
            raise LiftkitError(f"step {step + 1}: the {what} is {value}; {last}; {advice}")
        return row

    # -- its weights ------------------------------------------------------------------------------------------------

    def broken_tensor(self) -> str | None:
        """What to say of the first tensor of the network that is not finite; None where all are."""
        tensor = first_not_finite(self.trainee.network)
        return None if tensor is None else f"the model's tensor {tensor!r} holds NaN or infinity"

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The running mean in the place of the weights, without dropout."""
        if self.average is not None:
            self.average.exchange(self.parameters)
        self.model.eval()
        try:
            yield
        finally:
            if self.average is not None:
                self.average.exchange(self.parameters)

    def learned(self) -> dict[str, Tensor]:
        """What a run leaves, by name, on the CPU: the running mean where there is one. Every process has to call this."""
        learned = self.average.values if self.average is not None else self.parameters
        return {name: whole(value) for name, value in learned.items()}

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Everything that a checkpoint keeps, by file and name. Every process has to call this."""
        parameters = {name: whole(parameter) for name, parameter in self.parameters.items()}
        tensors = {"parameters": parameters, "optimizer": optimizer_tensors(self.bare, self.parameters)}
        if self.average is not None:
            tensors["average"] = {name: whole(value) for name, value in self.average.values.items()}
        if self.objective.adversary is not None:
            tensors["adversary"] = self.objective.adversary.tensors()
        return tensors

    def load(self, resumption: Resumption) -> dict[str, Any]:
        """Take everything from a checkpoint; its record.

        Raises:
            UsageError: if it is broken or of another recipe.
        """
        path, adversary = resumption.checkpoint, self.objective.adversary
        stems = [
            "parameters",
            "optimizer",
            *(["average"] if self.average else []),
            *(["adversary"] if adversary else []),
        ]
        tensors, record = read_checkpoint(path, stems)
        load_parameters(dict(self.parameters), tensors["parameters"], str(path))
        # Another optimizer has other state, and begins anew.
        if not any(change.key == "optimizer.name" for change in resumption.changes):
            load_optimizers(self.bare, self.parameters, tensors["optimizer"])
        if self.average is not None:
            load_parameters(self.average.values, tensors["average"], str(path))
        if adversary is not None:
            adversary.load(tensors["adversary"])
        return record
