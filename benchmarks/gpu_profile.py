"""Where the time of a finetuning step goes on a GPU, by kernel: python benchmarks/gpu_profile.py [--compile]

A step of a model of klein 4B's shape as benchmarks/gpu.py has it, beside its bare networks; then one step under torch's profiler.
With ``--compile --cudnn`` cuDNN's attention is on, which a run leaves off when it compiles: for whoever wants to know whether
that is safe and what it would save. It needs what benchmarks/gpu.py needs. Without a GPU it profiles tiny shapes, to see that
it works.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from _gpu_model import (
    TINY,
    Scale,
    batches,
    compile_options,
    device,
    latent_transformer,
    make_recipe,
    make_trainer,
    peak_gb,
)
from finetune import floor, whole

from liftkit.finetune.network import compile_for_training

ROUNDS, SHOWN, WIDTH = 4, 30, 120


def profiled(trainer: Any, given: Any) -> Any:
    """What torch's profiler counts in one step."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as profile:
        whole(trainer, given)
    return profile.key_averages()


def show(rows: Any) -> None:
    """The kernels that take longest, and how often the processor copies or waits."""
    gpu = torch.cuda.is_available()
    spent = lambda row: (row.self_device_time_total if gpu else row.self_cpu_time_total) / 1000
    kernels = sorted((row for row in rows if not gpu or "CUDA" in str(row.device_type)), key=spent, reverse=True)
    print(f"{sum(map(spent, kernels)):.1f} ms of {'kernels' if gpu else 'operations'}")
    for row in kernels[:SHOWN]:
        print(f"{spent(row):9.2f} ms {row.count:6d} x {row.key[:WIDTH]}")
    for row in rows:
        if "Synchronize" in row.key or "Memcpy" in row.key or row.key == "aten::_local_scalar_dense":
            print(f"{row.count:6d} x {row.key}, {row.cpu_time_total / 1000:.1f} ms of the processor")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--compile", action="store_true", help="the blocks")
    parser.add_argument("--cudnn", action="store_true", help="its attention on, where blocks are compiled")
    parser.add_argument("--checkpointing", action="store_true", help="of gradients")
    parser.add_argument("--float8", action="store_true", help="for the reference's products")
    chosen = parser.parse_args()
    scale = Scale() if torch.cuda.is_available() else TINY
    side = max(scale.resolutions)
    with tempfile.TemporaryDirectory() as scratch:
        changes: dict[str, Any] = {"gradient_checkpointing": chosen.checkpointing}
        if chosen.float8:
            changes["objective"] = {"reference_precision": "float8"}
        recipe = make_recipe(scale, Path(scratch) / "run", chosen.batch, **changes)
        trainer = make_trainer(scale, latent_transformer(scale, device()), recipe)
        trainer.learner.model.train()
        given = trainer.ahead.each(batches(scale, side, chosen.batch), 0)
        here = next(given).wait().batch
        if chosen.compile:
            compile_for_training(trainer.trainee.transformer, device(), **compile_options())
            torch.backends.cuda.enable_cudnn_sdp(chosen.cudnn)
        for _ in range(2):
            floor(trainer, here)
            whole(trainer, given)
        pairs = [(floor(trainer, here), whole(trainer, given)) for _ in range(ROUNDS)]
        bare, ours = (1000 * statistics.median(column) for column in zip(*pairs))
        print(f"networks {bare:.1f} ms, step {ours:.1f} ms, peak {peak_gb():.1f} GB")
        show(profiled(trainer, given))


if __name__ == "__main__":
    main()
