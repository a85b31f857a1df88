"""The loop: steps, and what happens between them (checkpoints, previews, validation, the end)."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from liftkit.data.batch import Batch
from liftkit.data.training import TrainingData
from liftkit.errors import LiftkitError
from liftkit.finetune.adversary import Adversary
from liftkit.finetune.ahead import Ahead, Prepared
from liftkit.finetune.interrupt import Interrupt
from liftkit.finetune.network import Reference, compile_blocks, connect
from liftkit.finetune.optimizer import Average, make_optimizers, rate_factor, set_rate, step_scaled
from liftkit.finetune.recipe import Recipe
from liftkit.finetune.repa import Repa, load_encoder
from liftkit.finetune.resume import Resumption
from liftkit.finetune.run_folder import RunFolder
from liftkit.finetune.sharding import keep_apart, set_sharding, share_gradients
from liftkit.finetune.speed import Speed, count_flops
from liftkit.finetune.stages import drop_gradients, trunk_of
from liftkit.finetune.state import (
    abandon_after,
    checkpoints,
    load_optimizers,
    load_parameters,
    optimizer_tensors,
    prune,
    read_checkpoint,
    whole,
    write_checkpoint,
)
from liftkit.finetune.step import Objective, step_seed, with_shift_of
from liftkit.finetune.terms import make_perceptual
from liftkit.finetune.trainee import COMPUTE, Trainee
from liftkit.finetune.watch import preview, preview_prompts, validate
from liftkit.models.broken import first_not_finite
from liftkit.progress import Observer
from liftkit.tally import Tally, combined

STEMS = ["parameters", "optimizer"]


@dataclass
class Outcome:
    """How a run ended.

    Args:
        step: steps done in all.
        seconds: of training in this session.
        stopped: whether it ended before its last step, by a signal or the file ``stop``.
        signal: its number; None where there was none in this process.
    """

    step: int
    seconds: float
    stopped: bool
    signal: int | None = None


class Trainer:
    """One run, ready to train.

    Args:
        recipe: what to do.
        trainee: the network; see :func:`liftkit.finetune.trainee.open_trainee`.
        data: prepared training data.
        held_out: prepared held-out data, where the recipe validates.
        vae: the checkpoint's own, where a perceptual term looks through it.
        accelerator: of accelerate.
        folder: of the run.
        observer: shows the progress.
        model: what tells it from others, plain; checkpoints keep it.
    """

    def __init__(
        self,
        recipe: Recipe,
        trainee: Trainee,
        data: TrainingData,
        held_out: TrainingData | None,
        vae: Any,
        accelerator: Any,
        folder: RunFolder,
        observer: Observer,
        model: dict[str, Any],
    ) -> None:
        self.recipe, self.trainee, self.data, self.held_out = recipe, trainee, data, held_out
        self.accelerator, self.folder, self.observer = accelerator, folder, observer
        self.model_record = model
        # Checkpoints keep the recipe as it was asked for.
        self.lifted = with_shift_of(trainee.lift, recipe)
        self.step = 0
        self._validated: float | None = None
        self.speed = Speed()
        self._wrap(vae)

    def _wrap(self, vae: Any) -> None:
        recipe, trainee, device = self.recipe, self.trainee, self.accelerator.device
        optimizers = make_optimizers(trainee.parameters, recipe.optimizer, trainee.spec)
        if recipe.compile:
            compile_blocks(trainee.transformer)
        set_sharding(self.accelerator, trainee.transformer, COMPUTE[recipe.precision])
        self.head = list(trainee.head.parameters()) if trainee.head is not None else []
        if trainee.head is not None:
            keep_apart(trainee.network, trainee.head)
        self.model, *self.optimizers = self.accelerator.prepare(trainee.network, *optimizers)
        self.bare = [getattr(each, "optimizer", each) for each in self.optimizers]
        # Sharding may have put other tensors in the places of parameters.
        self.parameters: dict[str, nn.Parameter] = trainee.parameters
        self.average = Average(self.parameters, recipe.ema) if recipe.ema.enabled else None
        student, latent = connect(trainee.transformer, self.model)
        lift = trainee.lift
        if lift is not None:
            lift = replace(lift, basis=lift.basis.float().to(device))
        asymmetric = recipe.objective.loss == "asymflow"
        reference = Reference(latent, lift) if asymmetric and latent is not None and lift is not None else None
        adversary = Adversary(recipe, device) if recipe.objective.adversarial else None
        perceptual = make_perceptual(recipe.objective.perceptual, vae, str(device))
        repa = None
        if recipe.objective.repa:
            repa = Repa(trainee.transformer, load_encoder(recipe.objective.repa_encoder), recipe.objective.repa_block)
        self.objective = Objective(recipe, student, reference, lift, perceptual, adversary, repa)
        self.ahead = Ahead(self.lifted, self._rows(), device, lift is not None)

    # -- the loop ---------------------------------------------------------------------------------------------------

    def train(self) -> Outcome:
        """Train to the last step, or until asked to stop; state is saved either way.

        Raises:
            LiftkitError: if the loss is no longer finite.
        """
        recipe = self.recipe
        self._validation = list(self._held_out_batches())
        one = self.data.batch(0, slice(0, 1)).to(self.accelerator.device)
        self.speed.flops = 0.0 if recipe.compile else count_flops(self.objective, one, recipe)
        begun = time.monotonic()
        stop = self.step >= recipe.steps
        batches = self.data.prefetch(self.step, recipe.steps, self._rows())
        ready = closing(self.ahead.each(batches, self.step))
        with (
            self.observer.stage("finetune", recipe.steps, "steps") as advance,
            Interrupt() as interrupt,
            ready as steps,
        ):
            advance(self.step)
            for prepared in steps:
                self._step(prepared)
                advance(1)
                stop = self._between(interrupt)
                if stop:
                    break
        return Outcome(self.step, time.monotonic() - begun, stop and self.step < recipe.steps, interrupt.number)

    def _rows(self) -> slice:
        """The rows of a global batch that are this process's."""
        share = self.recipe.batch_size // self.accelerator.num_processes
        return slice(self.accelerator.process_index * share, (self.accelerator.process_index + 1) * share)

    def _step(self, prepared: Prepared) -> None:
        began = time.monotonic()
        self._record(self.learn(prepared), began)

    def learn(self, prepared: Prepared) -> dict[str, Any]:
        """One optimizer step on a batch; its figures.

        In fp16 gradients may overflow; the step is then taken again with a smaller scale, so that no step is left out.

        Raises:
            LiftkitError: if loss or gradients are not finite; the weights are as they were.
        """
        recipe = self.recipe
        prepared = prepared.wait()
        if not self.model.training:
            self.model.train()
        set_rate(self.bare, rate_factor(recipe.optimizer, self.step, recipe.steps))
        while True:
            # For dropout; noise has generators of its own.
            torch.manual_seed(step_seed(recipe.seed, self.step) + self.accelerator.process_index)
            metrics = self._gradients(prepared)
            row = self._row(metrics, self._clip())
            if step_scaled(self.optimizers, self.accelerator.scaler, row["gradient_norm"]):
                break
            self._forget_gradients()
        if self.objective.adversary is not None:
            self.objective.adversary.step(rate_factor(recipe.optimizer, self.step, recipe.steps), self.accelerator)
        self._forget_gradients()
        self.step += 1
        if self.average is not None:
            self.average.update(self.parameters, self.step)
        return row

    def _forget_gradients(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        if self.objective.adversary is not None:
            self.objective.adversary.optimizer.zero_grad(set_to_none=True)

    def _gradients(self, prepared: Prepared) -> dict[str, Tensor]:
        """Gradients of this process's rows, in micro batches; the mean metrics."""
        recipe, device = self.recipe, self.accelerator.device
        batch, noise, sigma = prepared.batch, prepared.noise, prepared.sigma
        x0 = self.objective.state(batch)
        size = min(recipe.micro_batch or len(x0), len(x0))
        total: dict[str, Tensor] = {}
        for start in range(0, len(x0), size):
            part = slice(start, start + size)
            last = start + size >= len(x0)
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                found = self.objective(batch.rows(part), x0[part], noise[part], sigma[part])
                share = len(x0[part]) / len(x0)
                self.accelerator.backward(found.student * share)
                if found.adversary is not None:
                    found.adversary.backward()
            for name, value in {"loss": found.student.detach(), **found.metrics}.items():
                total[name] = total.get(name, torch.zeros((), device=device)) + share * value.float()
        share_gradients(self.accelerator, self.head)
        return total

    def _clip(self) -> Tensor:
        """Clip the gradients; their norm before, (). A trunk that is held has none."""
        trunk = self.recipe.optimizer.trunk
        if trunk is not None and self.step < trunk.start:
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

    def _row(self, metrics: dict[str, Tensor], norm: Tensor) -> dict[str, Any]:
        """The figures of a step, before its weights change; the run stops where they must not.

        Raises:
            LiftkitError: if loss or gradients are not finite. In fp16 gradients may overflow: see :func:`step_scaled`.
        """
        names = [*sorted(metrics), "gradient_norm"]
        # All at once: each look at a number waits for the device. It is the only one in a step.
        here = torch.stack([*(metrics[name] for name in names[:-1]), norm.float()])
        values = self.accelerator.reduce(here, "mean").tolist()
        row: dict[str, Any] = {"step": self.step + 1, **dict(zip(names, values))}
        for what, value in (("loss", row["loss"]), ("gradient's norm", row["gradient_norm"])):
            if math.isfinite(value) or (what != "loss" and self.accelerator.scaler is not None):
                continue
            found = checkpoints(self.folder.checkpoints)
            last = f"the last good checkpoint is {found[-1][1]}" if found else "there is no checkpoint yet"
            # The weights are as the last step left them: what is not finite in them came from the model's files.
            tensor = first_not_finite(self.trainee.network)
            advice = "try a lower optimizer.learning_rate or clip"
            if tensor is not None:
                advice = f"the model's tensor {tensor!r} holds NaN or infinity"
            raise LiftkitError(f"step {self.step + 1}: the {what} is {value}; {last}; {advice}")
        return row

    def _record(self, row: dict[str, Any], began: float) -> None:
        """Log a step."""
        self.speed.add(time.monotonic() - began)
        row["learning_rate"] = self.recipe.optimizer.learning_rate * rate_factor(
            self.recipe.optimizer, self.step - 1, self.recipe.steps
        )
        self.accelerator.log({key: value for key, value in row.items() if key != "step"}, step=self.step)
        if self.accelerator.is_main_process:
            self.folder.log({**row, "seconds": round(self.speed.recent[-1], 4)})
        self.observer.status(self._status(row))

    def _status(self, row: dict[str, Any]) -> str:
        """What a user watches; the other figures are in the log."""
        parts = [f"loss {row['loss']:.3f}", f"{self.recipe.batch_size / self.speed.per_step:.1f} images/s"]
        lost = sum(data.tally.lost for data in self._data())
        if lost:
            parts.append("1 image left out" if lost == 1 else f"{lost} images left out")
        return "  ".join(parts)

    # -- between steps ----------------------------------------------------------------------------------------------

    def _between(self, interrupt: Interrupt) -> bool:
        """Whatever is due after a step; whether to stop."""
        recipe, step = self.recipe, self.step
        last = step == recipe.steps
        save, stop, lost = self._asked(interrupt)
        if lost:
            self._name_lost()
        if _due(recipe.previews.every, step) or (recipe.previews.every and last):
            self._preview()
        if _due(recipe.validation.every, step) or (recipe.validation.every and last):
            self._validate()
        if _due(recipe.checkpoints.every, step) or last or save or stop:
            self.save()
        return stop

    def _asked(self, interrupt: Interrupt) -> tuple[bool, bool, bool]:
        """Whether anybody asks for a checkpoint or the end, or lost an image; all processes learn the same."""
        asked = [False, interrupt.arrived, bool(self.data.lost)]
        if self.accelerator.is_main_process:
            asked[0], asked[1] = self.folder.asked("save"), self.folder.asked("stop") or asked[1]
        if self.accelerator.num_processes == 1:
            # Nobody to ask: a look at the device would wait for the step to end there.
            return asked[0], asked[1], asked[2]
        here = torch.tensor(asked, dtype=torch.float32, device=self.accelerator.device)
        save, stop, lost = self.accelerator.reduce(here, "sum").tolist()
        return save > 0, stop > 0, lost > 0

    def _name_lost(self) -> None:
        """Name the images that any process could no longer read; the others of their kind take their rows."""
        from accelerate.utils import gather_object

        gathered = gather_object(self.data.lost)
        new = Tally("images")
        for name, reason in gathered:
            new.leave_out(name, reason)
            self.data.lose(name, reason)
        self.data.lost = []
        if new.lost and self.accelerator.is_main_process:
            self.folder.log({"step": self.step, "left_out": new.to_json(show=new.lost)["left_out"]})
            self.observer.note(f"step {self.step}: images that can no longer be used: {new.reasons()}")

    def tallies(self) -> list[Tally]:
        """Accounts of the images and captions that are trained on or held out, each kind once."""
        return combined(tally for data in self._data() for tally in data.tallies())

    def _data(self) -> list[TrainingData]:
        return [self.data, *([self.held_out] if self.held_out else [])]

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

    def _preview(self) -> None:
        from liftkit.report import over_time
        from liftkit.report.pictures import captioned
        from liftkit.report.saving import write_picture

        lift = self.trainee.lift
        if lift is None:
            return
        recipe, device = self.recipe, self.accelerator.device
        captions = preview_prompts(recipe, self.data)
        prompts = {name: value.to(device) for name, value in self.data.prompts(captions).items()}
        empty = {name: value.to(device) for name, value in self.data.prompts([""]).items()}
        shape = tuple(self.objective.state(self.data.batch(0, slice(0, 1)).to(device)).shape[1:])
        with self.averaged():
            states = preview(self.objective.student, prompts, empty, shape, self.lifted, device)
        if not states.isfinite().all():
            tensor = first_not_finite(self.trainee.network)
            why = f"the model's tensor {tensor!r} holds NaN or infinity" if tensor else "try precision=no"
            raise LiftkitError(f"step {self.step}: a preview is not finite; {why}")
        if not self.accelerator.is_main_process:
            return
        path = self.folder.previews / f"step-{self.step:07d}.png"
        seeds = range(recipe.previews.seed, recipe.previews.seed + len(captions))
        made = [{"prompt": prompt, "seed": seed, "step": self.step} for prompt, seed in zip(captions, seeds)]
        title = f"step {self.step} of {recipe.steps}"
        images = lift.color.decode(states)
        write_picture(captioned(images, captions, title, 8), path, made)
        over_time.add_column(self.folder.previews / over_time.NAME, self.step, images, captions)
        self.folder.log({"step": self.step, "preview": str(path.relative_to(self.folder.path))})
        self.observer.note(f"step {self.step}: preview {path}")

    def _held_out_batches(self) -> Iterator[Batch]:
        if self.held_out is None:
            return
        size = self.held_out.batch_size
        for step in range(-(-sum(len(source) for source in self.held_out.sources) // size)):
            yield self.held_out.batch(step)

    def _validate(self) -> None:
        if self.held_out is None:
            return
        with self.averaged():
            rows = validate(self.objective, self._validation, self.lifted, self.recipe.seed, self.accelerator.device)
        values = {f"validation/sigma_{sigma:.3f}": error for sigma, error in rows}
        self.accelerator.log(values, step=self.step)
        if self.accelerator.is_main_process:
            self.folder.log({"step": self.step, "validation": [[sigma, error] for sigma, error in rows]})
            mean = sum(error for _, error in rows) / len(rows)
            before = f" ({self._validated:.4f} before)" if self._validated is not None else ""
            self._validated = mean
            self.observer.note(f"step {self.step}: error on held-out images {mean:.4f}{before}")

    # -- state ------------------------------------------------------------------------------------------------------

    def save(self) -> Path | None:
        """Write a checkpoint; every process has to call this."""
        parameters = {name: whole(parameter) for name, parameter in self.parameters.items()}
        tensors = {"parameters": parameters, "optimizer": optimizer_tensors(self.bare, self.parameters)}
        if self.average is not None:
            tensors["average"] = {name: whole(value) for name, value in self.average.values.items()}
        if self.objective.adversary is not None:
            tensors["adversary"] = self.objective.adversary.tensors()
        path = None
        if self.accelerator.is_main_process:
            record = {
                "recipe": self.recipe.model_dump(mode="json"),
                "data": self.data.digest,
                "model": self.model_record,
            }
            path = write_checkpoint(self.folder.checkpoints, self.step, tensors, record, self.recipe.checkpoints.keep)
        self.accelerator.wait_for_everyone()
        return path

    def resume(self, resumption: Resumption) -> None:
        """Go on from a checkpoint. Where the data are not those of before it says so: one image that went away should not
        end a run for good.

        Raises:
            UsageError: if it is broken or of another recipe.
        """
        path = resumption.checkpoint
        stems = [*STEMS, *(["average"] if self.average else []), *(["adversary"] if self.objective.adversary else [])]
        tensors, record = read_checkpoint(path, stems)
        load_parameters(dict(self.parameters), tensors["parameters"], str(path))
        # Another optimizer has other state, and begins anew.
        if not any(change.key == "optimizer.name" for change in resumption.changes):
            load_optimizers(self.bare, self.parameters, tensors["optimizer"])
        if self.average is not None:
            load_parameters(self.average.values, tensors["average"], str(path))
        if self.objective.adversary is not None:
            self.objective.adversary.load(tensors["adversary"])
        self.step = resumption.step
        if self.accelerator.is_main_process:
            for moved in abandon_after(self.folder.checkpoints, self.step):
                self.observer.note(
                    f"{moved}: a checkpoint of the steps that are done again now; delete it if it is not needed"
                )
            # After the checkpoints: a run that dies in between goes on from this one and its log.
            self.folder.rewind(self.step)
            prune(self.folder.checkpoints, self.recipe.checkpoints.keep)
            if record.get("data", self.data.digest) != self.data.digest:
                text = "images or captions are not those that it was trained on"
                self.folder.log({"step": self.step, "note": text})
                self.observer.note(f"{path}: {text}; the run goes on, but not as it would have")
            for change in resumption.changes:
                self.folder.log({"step": self.step, "note": str(change)})


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0
