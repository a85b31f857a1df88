"""What a finetuning step costs beyond its floor, the bare networks: python -m benchmarks finetune [OVERRIDES]

Side by side in one run, in turns: our whole step (data, noise, loss, clipping, optimizer, running mean, log), and the floor
that no trainer can go below (student forward and backward, reference forward, on the same batch). Then the whole step with compiled
blocks beside the bare networks as they are. Then what it saves that images of low noise are left out of the reference pass, and
for which share of the images: under the recipe's noise and under the paper's. Then the memory: what a second copy of the base
weights would cost, and what is there.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from _table import Row, add_option, finish

from liftkit.finetune.network import bind
from liftkit.finetune.objective import rows_to_ask
from liftkit.finetune.recipe_file import load_recipe
from liftkit.finetune.run import prepare
from liftkit.finetune.run_folder import RunFolder
from liftkit.finetune.step import draw, quantile_levels
from liftkit.finetune.trainer import Trainer
from liftkit.progress import Silent
from liftkit.tokens import patchify, unpatchify


def floor(trainer: Trainer, batch) -> float:
    """Seconds of student forward and backward and one reference forward, nothing else."""
    objective, lift = trainer.learner.objective, trainer.learner.objective.lift
    x0 = objective.state(batch)
    noise, sigma = draw(tuple(x0.shape), trainer.recipe.noise, 0, 0)
    noise, sigma = noise.to(x0.device), sigma.to(x0.device)
    level = sigma.view(-1, 1, 1, 1)
    x_t = torch.lerp(x0, noise, level)
    tokens = patchify(batch.latents, lift.latent_patch)
    z_t = torch.lerp(
        batch.latents, unpatchify(torch.randn_like(tokens), lift.latent_patch, *batch.latents.shape[-2:]), level
    )
    synchronise(x0)
    start = time.perf_counter()
    with torch.no_grad():
        bind(objective.reference.flow, batch.prompts)(z_t, sigma)
    bind(objective.student, batch.prompts)(x_t, sigma).square().mean().backward()
    for parameter in trainer.learner.parameters.values():
        parameter.grad = None
    synchronise(x0)
    return time.perf_counter() - start


def whole(trainer: Trainer, batches) -> float:
    """Seconds of one step as a run takes it."""
    start = time.perf_counter()
    trainer.take(next(batches))
    synchronise(next(iter(trainer.learner.parameters.values())))
    return time.perf_counter() - start


def passes(trainer: Trainer, prepared, levels: list[float] | None) -> float:
    """Seconds of all passes and the loss; the reference's without rows of low noise, where levels are given."""
    objective = trainer.learner.objective
    x0 = objective.state(prepared.batch)
    synchronise(x0)
    start = time.perf_counter()
    objective(prepared.batch, x0, prepared.noise, prepared.sigma, levels).student.backward()
    synchronise(x0)
    for parameter in trainer.learner.parameters.values():
        parameter.grad = None
    return time.perf_counter() - start


def left_out(recipe) -> dict[str, float]:
    """The share of images that the reference is not asked for, under the recipe's noise and under the paper's."""
    paper = recipe.noise.model_copy(update={"mean": 0.0, "std": 1.0, "shift": 17.0, "latent_shift": None})
    choice, parts = recipe.objective, 100_000
    return {
        name: 1 - len(rows_to_ask(quantile_levels(noise, parts).tolist(), choice.kappa, choice.reference_below)) / parts
        for name, noise in (("recipe's", recipe.noise), ("paper's", paper))
    }


def begun(recipe, rounds: int):
    """A trainer that is ready, and its batches."""
    trainer = prepare(recipe, RunFolder(recipe.output), Silent())
    return trainer, trainer.ahead.each(trainer.data.prefetch(0, 6 * rounds + 8, trainer.rows), 0)


def synchronise(tensor) -> None:
    """Wait for a GPU."""
    if tensor.device.type == "cuda":
        torch.cuda.synchronize()


def resident() -> int:
    """Bytes of memory that the process has now."""
    fields = Path("/proc/self/statm").read_text().split() if Path("/proc/self/statm").exists() else ["0", "0"]
    return int(fields[1]) * 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("overrides", nargs="*", help="of the recipe tiny-klein")
    add_option(parser)
    chosen = parser.parse_args()
    with TemporaryDirectory() as scratch:
        overrides = [
            f"output={scratch}/run",
            "validation.every=0",
            "previews.every=0",
            "data.sources=[{kind: demo, count: 512}]",
        ]
        recipe = load_recipe("tiny-klein", [*overrides, *chosen.overrides])
        trainer, batches = begun(recipe, chosen.rounds)
        same = next(batches).wait().batch
        quick, others = begun(
            load_recipe("tiny-klein", [*overrides, *chosen.overrides, f"output={scratch}/compiled", "compile=true"]),
            chosen.rounds,
        )
        for _ in range(3):
            floor(trainer, same)
            whole(trainer, batches)
            whole(quick, others)
        rows = [(floor(trainer, same), whole(trainer, batches), whole(quick, others)) for _ in range(chosen.rounds)]
        each = [next(batches).wait() for _ in range(chosen.rounds)]
        asked = [(passes(trainer, one, None), passes(trainer, one, one.levels)) for one in each]
    bare, ours, fast = (statistics.median(column) for column in zip(*rows))
    ratio, faster = (statistics.median(row[place] / row[0] for row in rows) for place in (1, 2))
    network = trainer.trainee.network
    base = sum(p.numel() * p.element_size() for p in trainer.trainee.transformer.parameters() if not p.requires_grad)
    kept = sum(p.numel() * p.element_size() for p in network.originals.parameters())
    print(
        f"torch {version('torch')}, {torch.get_num_threads()} threads, {platform.machine()}, {trainer.accelerator.device}"
    )
    print(f"floor: student forward + backward, reference forward   {bare:.3f} s a step")
    print(f"ours: the whole step                                   {ours:.3f} s a step   ratio {ratio:.3f}")
    print(f"ours with compiled blocks                              {fast:.3f} s a step   ratio {faster:.3f}")
    print(f"frozen base weights {base / 1e6:.2f} MB, in memory once; the reference adds {kept / 1e6:.2f} MB")
    print(f"resident memory {resident() / 1e6:.0f} MB")
    shares = left_out(recipe)
    all_rows, fewer = (statistics.median(column) for column in zip(*asked))
    note = ", ".join(f"{share:.2%} of the images left out under the {name} noise" for name, share in shares.items())
    threads = f"{torch.get_num_threads()} threads"
    saved = statistics.median(b / a for a, b in asked)
    what = "finetune: passes without low noise / with all"
    found = [
        Row(
            "finetune: a step / its networks", bare, ours, "s", ratio, 1.1, note=f"{threads}, batch {recipe.batch_size}"
        ),
        Row("finetune: a compiled step / the networks as they are", bare, fast, "s", faster, 0.9, note=threads),
        Row(what, all_rows, fewer, "s", saved, 1.0, note=note),
    ]
    finish(found, chosen.rows)


if __name__ == "__main__":
    main()
