"""Attempts at a finetune of tiny-flux2, side by side on one GPU or one by one on a CPU: what docs/lab/tiny-flux2.md lists.

Each attempt is ``recipes/tiny-flux2.yaml`` with keys of its own, trained for a time instead of a number of steps, by which its
rate decays. Images, prompts and noise are drawn on the device, so that a step waits for nothing; all else is the product's: model,
objective, optimizers, running mean, samples and figures. Every result is a line of ``results.jsonl`` as soon as it is there,
and the weights of the best two attempts so far lie beside it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from liftkit.embedded import TINY_FLUX2
from tools.tiny_flux2 import flow
from tools.tiny_flux2.judged import judge, judge_base, pictures, record

HEAD = "trainable.head={channels: 48, depth: 4}"
ATTEMPTS: dict[str, list[str]] = {
    "no-head": ["trainable.head=null"],
    "head": [HEAD],
    "head-seed1": [HEAD, "seed=1"],
    "head-512": [HEAD, "batch_size=512"],
    "head-wide-noise": [HEAD, "noise.std=1.5"],
    "head-asymflow": [HEAD, "objective.loss=asymflow"],
    "head-perceptual": [HEAD, "objective.loss=asymflow", "objective.perceptual=vae"],
    "head-bands": [HEAD, "objective.bands={power: 0.5}"],
    "head-bands-1": [HEAD, "objective.bands={power: 1.0}"],
    "head-trunk": [HEAD, "optimizer.trunk={start: 100, factor: 0.3}"],
    "head-adversarial": [HEAD, "objective.adversarial=10", "objective.weight=5.0"],
    "head-open1": [HEAD, "trainable.open=1.0"],
    "head-wide": ["trainable.head={channels: 80, depth: 5}"],
    "borders": [
        "trainable.mode=head", "trainable.open=0", "objective.borders=20", "noise.shift=3", "noise.std=1.7",
        "optimizer.learning_rate=2e-3", "optimizer.warmup=20", "ema.start=20", "optimizer.decay_from=0.3",
        "optimizer.multipliers={}",
    ],
    "latent": ["space=latent", "trainable.open=0", "trainable.head=null"],
    "latent-512": ["space=latent", "trainable.open=0", "trainable.head=null", "batch_size=512"],
}  # fmt: skip
LEVELS = (0.1, 0.265, 0.435, 0.64, 0.81, 0.92, 0.97)
"""Noise levels at which held-out errors are taken: those of the sampler's last steps, and where it decides what to paint."""


def run(
    names: list[str],
    out: Path,
    *,
    device: str,
    seconds: float,
    base: Callable[[], None] | None,
    pool: int,
    count: int,
    keys: list[str],
) -> None:
    """Train and judge attempts side by side, each in a process of its own that loads what it needs while the base trains.

    Args:
        names: of :data:`ATTEMPTS`.
        out: for results, pictures and weights.
        device: ``cuda`` or ``cpu``.
        seconds: of training each.
        base: trains the base; None where there is one.
        pool: images to train on.
        count: samples to judge.
        keys: of the recipe, for all attempts.
    """
    out.mkdir(parents=True, exist_ok=True)
    flow.WORK.mkdir(parents=True, exist_ok=True)
    ready = flow.WORK / "ready"
    ready.unlink(missing_ok=True)
    cores = os.cpu_count() or 1
    images, _ = flow.draw(pool, max(1, cores - 1))
    np.save(flow.WORK / "pool.npy", images.numpy())
    common_keys = [part for key in keys for part in ("--set", key)]
    share = max(1, cores // max(1, len(names)))
    common = [
        "--device",
        device,
        "--seconds",
        str(seconds),
        "--count",
        str(count),
        "--threads",
        str(share),
        *common_keys,
    ]
    started = [
        subprocess.Popen([sys.executable, "-u", "-m", "tools.tiny_flux2", "attempt", name, str(out), *common])
        for name in names
    ]
    try:
        if base is not None:
            base()
        _prepare(out, device)
        ready.touch()
        _note("ready")
        judge_base(out, device, count)
    finally:
        ready.touch()
        for process in started:
            process.wait()
    pictures(out)


def attempt(
    name: str,
    out: Path,
    *,
    device: str,
    seconds: float,
    steps: int | None,
    count: int,
    keys: list[str],
    label: str | None,
) -> None:
    """One attempt: wait for the base, train, write what was learned, judge it.

    Args:
        name: of :data:`ATTEMPTS`.
        out, device, count, keys: see :func:`run`; without samples it is known by its held-out errors alone.
        seconds: of training.
        steps: of training, instead.
        label: of its results, for more than one attempt of a name; the name itself if None.
    """
    import diffusers  # noqa: F401
    import transformers  # noqa: F401

    from liftkit.finetune import run as finetuning
    from liftkit.finetune.optimizer import rate_factor
    from liftkit.finetune.run_folder import RunFolder
    from liftkit.progress import Silent

    if device == "cuda":
        torch.zeros(1, device=device)
    while not (flow.WORK / "ready").exists():
        time.sleep(0.1)
    began = time.monotonic()
    latent, label = "space=latent" in ATTEMPTS[name], label or name
    model = flow.WORK / ("model" if latent else "pixel")
    recipe = _recipe(model, flow.WORK / "runs" / label, [*ATTEMPTS[name], *keys])
    trainer = finetuning.prepare(recipe, RunFolder(recipe.output), Silent())
    batches = _Batches(trainer, recipe)
    _note(f"{label}: ready to train after {time.monotonic() - began:.0f} s")
    began, busy, losses, choice = time.monotonic(), time.process_time(), [], recipe.optimizer

    def done() -> float:
        return trainer.step / steps if steps else (time.monotonic() - began) / seconds

    def factor(step: int) -> float:
        warm = min(1.0, (step + 1) / max(1, choice.warmup))
        return warm * rate_factor(choice.model_copy(update={"warmup": 0}), int(min(0.999, done()) * 1000), 1000)

    trainer.learner.rate = factor
    while done() < 1.0:
        losses.append(trainer.learner.learn(batches(trainer.step), trainer.step)["loss"])
        trainer.step += 1
        if trainer.step % 100 == 0:
            _note(f"{label}: {trainer.step} steps, loss {np.mean(losses[-100:]):.3f}")
    fifths = np.array_split(np.array(losses), 5)
    found = {
        "name": label, "keys": [*ATTEMPTS[name], *keys], "steps": trainer.step, "batch": recipe.batch_size,
        "seconds": round(time.monotonic() - began, 1), "cpu_seconds": round(time.process_time() - busy, 1),
        "losses": [round(float(part.mean()), 4) for part in fifths if len(part)],
    }  # fmt: skip
    written = finetuning._write_result(trainer, RunFolder(recipe.output), Silent())
    found["record"] = json.loads((written / "liftkit.json").read_text())
    if not latent:
        found["errors"] = _errors(trainer, batches)
    figures = judge(str(written), str(model), label, device, count) if count else {}
    record(out, {**found, **figures})


def _recipe(model: Path, folder: Path, keys: list[str]) -> Any:
    """recipes/tiny-flux2.yaml for a run that draws its own batches and keeps nothing but its result."""
    from liftkit.finetune.recipe_file import load_recipe

    shutil.rmtree(folder, ignore_errors=True)
    choices = [
        f"model={model}", f"output={folder}", "data.sources=[{kind: demo, count: 896}]",
        f"data.cache={folder / 'cache'}", "validation.every=0", "previews.every=0", "checkpoints.every=0", "trackers=[]",
        "data.workers=1", "save=adapter",
    ]  # fmt: skip
    return load_recipe("recipes/tiny-flux2.yaml", [*choices, *keys])


@torch.no_grad()
def _errors(trainer: Any, batches: _Batches, count: int = 256) -> dict[str, float]:
    """The mean square of the velocity's error at each of :data:`LEVELS`, of held-out images and one noise."""
    from liftkit.color import to_signed
    from liftkit.data import demo
    from liftkit.evaluate.real import open_real
    from liftkit.finetune.network import bind

    real = open_real("demo", count, 64, 0, None)
    numbers = {scene: index for index, scene in enumerate(demo.all_scenes())}
    assert real.scenes is not None
    rows = torch.tensor([numbers[scene] for scene in real.scenes])
    x0 = trainer.learner.objective.lift.color.encode(to_signed(real.shown).to(batches.device))
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)).to(batches.device)
    found = {}
    with trainer.learner.averaged():
        for level in LEVELS:
            total = 0.0
            for part in torch.arange(count).split(64):
                prompts = {name: table[rows[part]] for name, table in batches.prompts.items()}
                sigma = torch.full((len(part),), level, device=batches.device)
                x_t = torch.lerp(x0[part], noise[part], level)
                with torch.autocast(batches.device.type, torch.bfloat16):
                    u = bind(trainer.learner.objective.student, prompts)(x_t, sigma).float()
                total += float((noise[part] - x0[part] - u).square().mean()) * len(part)
            found[str(level)] = round(total / count, 5)
    return found


def _note(what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {what}", flush=True)


def _prepare(out: Path, device: str) -> None:
    """The base as a pipeline folder, and its conversion."""
    from liftkit.conversion.execute import convert
    from tools.tiny_flux2.assemble import assemble

    model, pixel = flow.WORK / "model", flow.WORK / "pixel"
    if (flow.WORK / "flow.safetensors").is_file():
        assemble(model)
    else:
        shutil.copytree(TINY_FLUX2, model, dirs_exist_ok=True)
    shutil.copyfile(model / "transformer" / "diffusion_pytorch_model.safetensors", out / "base.safetensors")
    _note("assembled")
    convert(str(model), pixel, images="demo", device=device, color="oklab", proof="projections", overwrite=True)
    shutil.copyfile(pixel / "lift.safetensors", out / "lift.safetensors")


class _Batches:
    """Batches and their noise, made on the device from images that lie there."""

    def __init__(self, trainer: Any, recipe: Any) -> None:
        from liftkit.data import demo
        from liftkit.finetune.encoders import load_vae as load_model_vae

        self.device, self.size, self.drop = trainer.accelerator.device, recipe.batch_size, recipe.data.prompt_dropout
        self.images = torch.from_numpy(np.load(flow.WORK / "pool.npy")).to(self.device)
        prompts = [scene.prompt for scene in demo.all_scenes()]
        numbers = {scene: index for index, scene in enumerate(demo.all_scenes())}
        self.captions = torch.tensor([numbers[demo.scene_at(index)] for index in range(len(self.images))]).to(
            self.device
        )
        table = trainer.data.prompts([*prompts, ""])
        self.prompts = {name: value.to(self.device) for name, value in table.items()}
        self.tokens, self.vae = None, None
        if trainer.learner.objective.reference is not None or recipe.space == "latent":
            kept = flow.WORK / "latents.safetensors"
            tokens = load_file(kept)["latents"] if kept.is_file() else torch.empty(0)
            if len(tokens) >= len(self.images):
                self.tokens = tokens[: len(self.images)].to(self.device)
            else:
                self.vae = load_model_vae(trainer.trainee.folder).to(self.device).requires_grad_(False)
        self.pixels, self.seed, self.noise = recipe.space == "pixel", recipe.seed, recipe.noise
        self.generator = torch.Generator(self.device).manual_seed(recipe.seed + 77)

    def __call__(self, step: int) -> Any:
        from liftkit.color import to_signed
        from liftkit.data.batch import Batch
        from liftkit.finetune.ahead import Prepared
        from liftkit.finetune.step import shifted, step_seed
        from liftkit.models.latents import LatentSpace

        index = torch.randint(len(self.images), (self.size,), generator=self.generator, device=self.device)
        images = self.images[index]
        dropped = torch.rand(self.size, generator=self.generator, device=self.device) < self.drop
        rows = torch.where(dropped, len(next(iter(self.prompts.values()))) - 1, self.captions[index])
        latents = None if self.vae is None else LatentSpace(self.vae).encode(to_signed(images))
        if self.tokens is not None:
            packed = self.tokens[index].float().transpose(1, 2)
            side = int(packed.shape[-1] ** 0.5)
            latents = F.pixel_shuffle(packed.unflatten(2, (side, side)), 2)
        batch = Batch(images, latents, {name: table[rows] for name, table in self.prompts.items()}, [], [])
        states = images if self.pixels or latents is None else latents
        generator = torch.Generator(self.device).manual_seed(step_seed(self.seed, step))
        noise = torch.randn(states.shape, generator=generator, device=self.device)
        times = self.noise.mean + self.noise.std * torch.randn(self.size, generator=generator, device=self.device)
        return Prepared(batch, noise, shifted(torch.sigmoid(times), self.noise.shift))
