"""Attempts at a finetune of tiny-flux2, side by side on one GPU or one by one on a CPU: what docs/lab/tiny-flux2.md lists.

Each attempt is ``recipes/tiny-flux2.yaml`` with keys of its own, trained for a time instead of a number of steps, by which its
rate decays. Images, prompts and noise are drawn on the device, so that a step waits for nothing; all else is the product's: model,
objective, optimizers, running mean, samples and figures. Every result is a line of ``results.jsonl`` as soon as it is there,
and the weights of the best two attempts so far lie beside it.
"""

from __future__ import annotations

import fcntl
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
from torch import Tensor

from liftkit.embedded import TINY_FLUX2
from tools.tiny_flux2 import flow

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
    "latent": ["space=latent", "trainable.open=0", "trainable.head=null"],
    "latent-512": ["space=latent", "trainable.open=0", "trainable.head=null", "batch_size=512"],
}
GUIDANCE = 4.0
COUNT = 512
TEST_STEPS = int(os.environ.get("TINY_FLUX2_TEST_STEPS", "400"))
"""Of the two-sample test; fewer to try the script."""


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
        _judge_base(out, device, count)
    finally:
        ready.touch()
        for process in started:
            process.wait()
    pictures(out)


def attempt(name: str, out: Path, *, device: str, seconds: float, count: int, keys: list[str]) -> None:
    """One attempt: wait for the base, train, write what was learned, judge it."""
    import diffusers  # noqa: F401
    import transformers  # noqa: F401

    from liftkit.finetune import run as finetuning
    from liftkit.finetune.optimizer import rate_factor
    from liftkit.finetune.recipe_file import load_recipe
    from liftkit.finetune.run_folder import RunFolder
    from liftkit.progress import Silent

    if device == "cuda":
        torch.zeros(1, device=device)
    while not (flow.WORK / "ready").exists():
        time.sleep(0.1)
    began = time.monotonic()
    latent = "space=latent" in ATTEMPTS[name]
    folder = flow.WORK / "runs" / name
    shutil.rmtree(folder, ignore_errors=True)
    choices = [
        f"model={flow.WORK / ('model' if latent else 'pixel')}", f"output={folder}", "data.sources=[{kind: demo, count: 896}]",
        f"data.cache={folder / 'cache'}", "validation.every=0", "previews.every=0", "checkpoints.every=0", "trackers=[]",
        "data.workers=1", "save=adapter",
    ]  # fmt: skip
    recipe = load_recipe("recipes/tiny-flux2.yaml", [*choices, *keys, *ATTEMPTS[name]])
    trainer = finetuning.prepare(recipe, RunFolder(recipe.output), Silent())
    batches = _Batches(trainer, recipe)
    _note(f"{name}: ready to train after {time.monotonic() - began:.0f} s")
    began, losses, choice = time.monotonic(), [], recipe.optimizer

    def factor(step: int) -> float:
        warm = min(1.0, (step + 1) / max(1, choice.warmup))
        done = min(0.999, (time.monotonic() - began) / seconds)
        return warm * rate_factor(choice.model_copy(update={"warmup": 0}), int(done * 1000), 1000)

    trainer.learner.rate = factor
    while time.monotonic() - began < seconds:
        row = trainer.learner.learn(batches(trainer.step), trainer.step)
        trainer.step += 1
        losses.append(row["loss"])
    spent = time.monotonic() - began
    written = finetuning._write_result(trainer, RunFolder(recipe.output), Silent())
    fifths = np.array_split(np.array(losses), 5)
    found = {
        "name": name, "keys": ATTEMPTS[name], "steps": trainer.step, "batch": recipe.batch_size, "seconds": round(spent, 1),
        "losses": [round(float(part.mean()), 4) for part in fifths if len(part)],
    }  # fmt: skip
    model = flow.WORK / ("model" if latent else "pixel")
    found["record"] = json.loads((written / "liftkit.json").read_text())
    record(out, {**found, **judge(str(written), str(model), name, device, count)})


def judge(
    model: str, base: str, name: str, device: str, count: int, guidance: float = GUIDANCE, steps: int = 16
) -> dict[str, Any]:
    """The figures of a model's samples as ``liftkit compare`` has them; some of the samples are kept."""
    from liftkit.evaluate.entries import open_entry
    from liftkit.evaluate.real import open_real
    from liftkit.evaluate.tied import Settings, tied_samples
    from liftkit.lift import Lift
    from liftkit.options import Guidance
    from liftkit.progress import Silent

    real = open_real("demo", count, 64, 0, None)
    tie = Lift.load(flow.WORK / "pixel" / "lift.safetensors")
    cache = flow.WORK / "judged"
    settings = Settings(real.prompts, 64, 0, Guidance(scale=guidance), None, device, 128, cache)
    images = tied_samples(open_entry(model, base), tie, steps, settings, Silent(), name)
    return {"guidance": guidance, **figures(images, real, name)}


def figures(images: Tensor, real: Any, name: str) -> dict[str, Any]:
    """The figures of uint8 images (n, 3, 64, 64); the first eight are kept as a row of pictures."""
    from liftkit.evaluate.figures import Scorer

    flow.WORK.joinpath("rows").mkdir(parents=True, exist_ok=True)
    np.save(flow.WORK / "rows" / f"{name}.npy", images[:8].numpy())
    score = Scorer(real.reference, patch=16, scenes=real.scenes, steps=TEST_STEPS).score(images)
    return {key: None if value is None else round(value, 4) for key, value in score.figures.items()}


def pictures(out: Path) -> None:
    """All rows of samples, one below the other, enlarged threefold."""
    from PIL import Image, ImageDraw

    rows = sorted((flow.WORK / "rows").glob("*.npy"))
    sheet = Image.new("RGB", (8 * 194, 212 * len(rows)), "white")
    for index, path in enumerate(rows):
        ImageDraw.Draw(sheet).text((4, index * 212 + 2), path.stem, fill="black")
        for column, image in enumerate(np.load(path)):
            shown = Image.fromarray(image.transpose(1, 2, 0)).resize((192, 192), Image.Resampling.NEAREST)
            sheet.paste(shown, (column * 194, index * 212 + 16))
    sheet.save(out / "samples.png", optimize=True)


def record(out: Path, row: dict[str, Any]) -> None:
    """A line of results; processes write whole lines."""
    with (out / "results.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())
    print(json.dumps({key: value for key, value in row.items() if key != "record"}), flush=True)
    _keep_best(out)


def _keep_best(out: Path, most: int = 2) -> None:
    """The weights of the attempts at pixels that the two-sample test finds nearest to real images so far."""
    with (flow.WORK / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
        tried = [row for row in rows if row["name"] in ATTEMPTS and "space=latent" not in row["keys"]]
        best = [row["name"] for row in sorted(tried, key=lambda row: row["two_sample"])[:most]]
        kept = {out / f"best-{name}.safetensors" for name in best}
        for path in set(out.glob("best-*.safetensors")) - kept:
            path.unlink()
        for name in best:
            if not (out / f"best-{name}.safetensors").exists():
                shutil.copyfile(
                    flow.WORK / "runs" / name / "adapter" / "adapter.safetensors", out / f"best-{name}.safetensors"
                )


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


def _judge_base(out: Path, device: str, count: int) -> None:
    """The rows that every attempt is beside: real images, those through the VAE, the base, and its conversion untrained."""
    from liftkit.color import to_signed, to_uint8
    from liftkit.evaluate.real import open_real
    from liftkit.models.latents import LatentSpace
    from liftkit.models.load import load_vae

    real = open_real("demo", count, 64, 0, None)
    model, pixel = str(flow.WORK / "model"), str(flow.WORK / "pixel")
    for guidance in (2.0, 4.0):
        record(
            out,
            {"name": f"base-{guidance:g}", **judge(model, model, f"0-base-{guidance:g}", device, count, guidance)},
        )
    space = LatentSpace(load_vae(flow.WORK / "model").to(device))
    shown = torch.cat(
        [to_uint8(space.decode(space.encode(to_signed(part).to(device)))).cpu() for part in real.shown.split(64)]
    )
    record(out, {"name": "vae", **figures(shown, real, "0-vae")})
    record(out, {"name": "converted", **judge(pixel, model, "0-converted", device, count)})


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
