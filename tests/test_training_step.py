"""The mechanics of one training step: scaled gradients, what is made ready ahead, the running mean."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from liftkit.errors import LiftkitError
from liftkit.finetune.ahead import Ahead
from liftkit.finetune.learner import Learner
from liftkit.finetune.optimizer import Average
from liftkit.finetune.recipe import Recipe
from liftkit.finetune.recipe_file import load_recipe
from liftkit.finetune.recipe_sections import Ema
from liftkit.finetune.run import prepare
from liftkit.finetune.run_folder import RunFolder
from liftkit.finetune.step import draw
from liftkit.finetune.trainer import Trainer
from liftkit.progress import Silent
from tests.training import TEXT

PLAIN = ("previews.every=0", "validation.every=0", "checkpoints.every=0")


@pytest.fixture(scope="module")
def make(pixel_klein: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Trainers of short runs; overrides as on the command line."""
    root = tmp_path_factory.mktemp("step")

    def trainer(name: str, *overrides: str) -> Trainer:
        file = root / f"{name}.yaml"
        file.write_text(TEXT.format(model=pixel_klein, output=root / name, cache=root / "cache", threads=1))
        recipe = load_recipe(file, [*PLAIN, *overrides])
        return prepare(recipe, RunFolder(recipe.output), Silent())

    return trainer


def scaled(trainer: Trainer, monkeypatch: pytest.MonkeyPatch, scale: float) -> Any:
    """Give a trainer the scaler that accelerate makes for fp16 on a GPU."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)

    def unscale() -> None:
        for optimizer in trainer.learner.bare:
            scaler.unscale_(optimizer)

    monkeypatch.setattr(trainer.accelerator, "scaler", scaler)
    monkeypatch.setattr(trainer.accelerator, "unscale_gradients", unscale)
    return scaler


def losses(trainer: Trainer, steps: int) -> list[float]:
    ready = trainer.ahead.each(trainer.data.prefetch(0, steps), 0)
    return [trainer.learner.learn(prepared, step)["loss"] for step, prepared in enumerate(ready)]


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_step_whose_gradients_overflow_is_taken_again(make: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Powers of two as scales change no digit: the losses are those of a run without a scaler."""
    options = (f"optimizer.name={name}", "steps=4", "objective.adversarial=0")
    expected = losses(make("plain", *options), 4)
    trainer = make("scaled", *options)
    scaler = scaled(trainer, monkeypatch, 2.0**127)
    assert losses(trainer, 4) == expected
    assert 1.0 < scaler.get_scale() < 2.0**126


def test_gradients_that_overflow_at_every_scale_end_the_run(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make("hopeless")
    scaled(trainer, monkeypatch, 4.0)
    with torch.no_grad():
        next(iter(trainer.learner.parameters.values())).fill_(float("nan"))
    monkeypatch.setattr(Learner, "_row", lambda *_: {"gradient_norm": float("inf")})
    with pytest.raises(LiftkitError, match="whatever their scale; use precision: bf16"):
        losses(trainer, 1)


def test_what_is_made_ready_ahead_is_what_the_step_would_have_drawn(make: Any) -> None:
    trainer = make("ahead")
    steps = list(trainer.ahead.each(trainer.data.prefetch(3, 6), 3))
    assert len(steps) == 3
    for step, prepared in enumerate(steps, start=3):
        noise, sigma = draw(tuple(prepared.batch.images.shape), trainer.lifted.noise, trainer.recipe.seed, step)
        assert torch.equal(prepared.noise, noise)
        assert torch.equal(prepared.sigma, sigma)
        assert torch.equal(prepared.batch.images, trainer.data.batch(step).images)


def test_each_process_takes_its_rows_of_the_same_noise(make: Any) -> None:
    trainer = make("rows")
    recipe: Recipe = trainer.lifted
    batch = trainer.data.batch(0)
    whole = trainer.ahead(0, batch)
    parts = [
        Ahead(recipe, rows, torch.device("cpu"), pixels=True)(0, batch.rows(rows))
        for rows in (slice(0, 2), slice(2, 4))
    ]
    assert torch.equal(torch.cat([part.noise for part in parts]), whole.noise)
    assert torch.equal(torch.cat([part.sigma for part in parts]), whole.sigma)


def test_the_running_mean_is_karras_power_function() -> None:
    generator = torch.Generator().manual_seed(0)
    steps = [{"a": torch.randn(3, generator=generator), "b": torch.randn(2, 2, generator=generator)} for _ in range(5)]
    average = Average(
        {name: torch.nn.Parameter(value.clone()) for name, value in steps[0].items()}, Ema(gamma=2.0, start=0)
    )
    expected = dict(steps[0])
    for step, values in enumerate(steps, start=1):
        average.update({name: torch.nn.Parameter(value) for name, value in values.items()}, step)
        kept = (1 - 1 / step) ** 3
        expected = {name: kept * expected[name] + (1 - kept) * value for name, value in values.items()}
        torch.testing.assert_close(average.values, expected)


def test_a_step_looks_at_the_device_once(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every other look at a number would make the host wait for a GPU before it has queued the next piece of work."""
    trainer = make("looks", "objective.adversarial=0", "micro_batch=2", "steps=2")
    ready = trainer.ahead.each(trainer.data.prefetch(0, 2), 0)
    trainer.learner.learn(next(ready), 0)  # the first one makes what the others reuse
    prepared, looks, here = next(ready), [], threading.get_ident()

    def counted(name: str) -> Any:
        real = getattr(torch.Tensor, name)

        def look(self: torch.Tensor, *given: Any) -> Any:
            if threading.get_ident() == here:
                looks.append(name)
            return real(self, *given)

        return look

    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, counted(name))
    trainer.learner.learn(prepared, 1)
    monkeypatch.undo()
    assert looks == ["tolist"]
