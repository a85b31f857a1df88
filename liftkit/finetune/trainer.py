"""The loop: steps, and what happens between them (checkpoints, previews, validation, the end)."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch

from liftkit.data.training import TrainingData
from liftkit.finetune.ahead import Ahead, Prepared
from liftkit.finetune.interrupt import Interrupt
from liftkit.finetune.learner import Learner
from liftkit.finetune.recipe import Recipe
from liftkit.finetune.resume import Resumption
from liftkit.finetune.run_folder import RunFolder
from liftkit.finetune.speed import Speed, count_flops
from liftkit.finetune.state import abandon_after, prune, write_checkpoint
from liftkit.finetune.step import with_shift_of
from liftkit.finetune.trainee import Trainee
from liftkit.finetune.watch import Watch
from liftkit.progress import Observer
from liftkit.tally import Tally, combined


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
        self.learner = Learner(recipe, trainee, vae, accelerator)
        # Checkpoints keep the recipe as it was asked for.
        self.lifted = with_shift_of(trainee.lift, recipe)
        self.ahead = Ahead(self.lifted, self.rows, accelerator.device, trainee.lift is not None)
        self.step = 0
        self.speed = Speed()

    @property
    def rows(self) -> slice:
        """The rows of a global batch that are this process's."""
        share = self.recipe.batch_size // self.accelerator.num_processes
        return slice(self.accelerator.process_index * share, (self.accelerator.process_index + 1) * share)

    # -- the loop ---------------------------------------------------------------------------------------------------

    def train(self) -> Outcome:
        """Train to the last step, or until asked to stop; state is saved either way.

        Raises:
            LiftkitError: if the loss is no longer finite.
        """
        recipe = self.recipe
        watch = Watch(self.learner, self.data, self.held_out, self.lifted, self.folder, self.observer)
        one = self.data.batch(0, slice(0, 1)).to(self.accelerator.device)
        self.speed.flops = 0.0 if recipe.compile else count_flops(self.learner.objective, one, recipe)
        begun = time.monotonic()
        stop = self.step >= recipe.steps
        batches = self.data.prefetch(self.step, recipe.steps, self.rows)
        ready = closing(self.ahead.each(batches, self.step))
        with (
            self.observer.stage("finetune", recipe.steps, "steps") as advance,
            Interrupt() as interrupt,
            ready as steps,
        ):
            advance(self.step)
            for prepared in steps:
                self.take(prepared)
                advance(1)
                stop = self._between(interrupt, watch)
                if stop:
                    break
        return Outcome(self.step, time.monotonic() - begun, stop and self.step < recipe.steps, interrupt.number)

    def take(self, prepared: Prepared) -> None:
        """One step, and its line in the log.

        Raises:
            LiftkitError: if loss or gradients are not finite; the weights are as they were.
        """
        began = time.monotonic()
        row = self.learner.learn(prepared, self.step)
        self.step += 1
        self.speed.add(time.monotonic() - began)
        row["learning_rate"] = self.recipe.optimizer.learning_rate * self.learner.rate(self.step - 1)
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

    def _between(self, interrupt: Interrupt, watch: Watch) -> bool:
        """Whatever is due after a step; whether to stop."""
        recipe, last = self.recipe, self.step == self.recipe.steps
        save, stop, lost = self._asked(interrupt)
        if lost:
            self._name_lost()
        if recipe.previews.every and (self._due(recipe.previews.every) or last):
            watch.preview(self.step)
        if recipe.validation.every and (self._due(recipe.validation.every) or last):
            watch.validate(self.step)
        if self._due(recipe.checkpoints.every) or last or save or stop:
            self.save()
        return stop

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

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

    # -- state ------------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint; every process has to call this."""
        tensors = self.learner.tensors()
        if self.accelerator.is_main_process:
            record = {
                "recipe": self.recipe.model_dump(mode="json"),
                "data": self.data.digest,
                "model": self.model_record,
            }
            write_checkpoint(self.folder.checkpoints, self.step, tensors, record, self.recipe.checkpoints.keep)
        self.accelerator.wait_for_everyone()

    def resume(self, resumption: Resumption) -> None:
        """Go on from a checkpoint. Where the data are not those of before it says so: one image that went away should not
        end a run for good.

        Raises:
            UsageError: if it is broken or of another recipe.
        """
        record = self.learner.load(resumption)
        self.step = resumption.step
        if not self.accelerator.is_main_process:
            return
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
            self.observer.note(f"{resumption.checkpoint}: {text}; the run goes on, but not as it would have")
        for change in resumption.changes:
            self.folder.log({"step": self.step, "note": str(change)})
