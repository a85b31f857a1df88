"""Which part of a compiled finetuning step reads memory that is not its own, where a step's time goes beside the bare
networks, and which operation an SD3's proof in float32 owes its deviation to: python benchmarks/_gpu_faults.py

Each variant is a process of its own on a transformer of few layers of FLUX.2 klein 4B's width; all of them run at once, for
what is asked is whether they fail.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

from gpu import environment

VARIANTS: dict[str, dict[str, str]] = {
    "blocking": {"CUDA_LAUNCH_BLOCKING": "1"},
    "batch-4-then-2": {},
    "out-of-memory-then-2": {},
    "without-cudnn": {},
    "math-attention": {},
    "aot_eager": {},
    "student-alone": {},
    "no-adapters": {},
    "deep": {},
}
"""Names, with variables of the environment."""


def scale(layers: int, single: int) -> Any:
    from _gpu_model import TINY, Scale, device

    if device().type == "cpu":
        return TINY
    whole = Scale()
    return replace(whole, config={**whole.config, "num_layers": layers, "num_single_layers": single})


def trainer_of(chosen: Any, batch: int, folder: Path, **changes: Any) -> tuple[Any, Any, Any]:
    """A trainer, batches, and one of them on the device."""
    from _gpu_model import batches, device, latent_transformer, make_recipe, make_trainer

    trainer = make_trainer(
        chosen, latent_transformer(chosen, device()), make_recipe(chosen, folder / "run", batch, **changes)
    )
    given = trainer.ahead.each(batches(chosen, max(chosen.resolutions), batch), 0)
    trainer.learner.model.train()
    return trainer, given, next(given).wait().batch


def steps(chosen: Any, batch: int, folder: Path, options: dict[str, Any], say: Any, **changes: Any) -> None:
    """The floor and a step, twice, compiled."""
    from _gpu_sections import fresh
    from finetune import floor, whole

    from liftkit.finetune.network import compile_blocks

    fresh()
    trainer, given, here = trainer_of(chosen, batch, folder, **changes)
    compile_blocks(trainer.trainee.transformer, **options)
    for turn in range(2):
        floor(trainer, here)
        say(f"batch {batch}: floor {turn}")
        whole(trainer, given)
        say(f"batch {batch}: step {turn}")


def play(variant: str) -> None:
    """One variant."""
    import torch

    began = time.monotonic()

    def say(text: str) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        print(f"  {variant}: {time.monotonic() - began:.0f} s {text}", flush=True)

    options: dict[str, Any] = {} if torch.cuda.is_available() else {"backend": "aot_eager"}
    few = scale(1, 2)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if variant == "batch-4-then-2":
            steps(few, 4, folder, options, say)
            steps(few, 2, folder, options, say)
        elif variant == "out-of-memory-then-2":
            if torch.cuda.is_available():
                total = torch.cuda.get_device_properties(0).total_memory
                torch.cuda.set_per_process_memory_fraction(8.5e9 / total)
            try:
                steps(few, 4, folder, options, say)
            except torch.cuda.OutOfMemoryError as error:
                say(f"out of memory: {str(error)[:90]}")
            if torch.cuda.is_available():
                torch.cuda.set_per_process_memory_fraction(1.0)
            steps(few, 2, folder, options, say)
        elif variant == "deep":
            steps(scale(5, 20), 2, folder, options, say, gradient_checkpointing=True)
        elif variant == "student-alone":
            alone(few, folder, options, say)
        else:
            if variant == "without-cudnn":
                torch.backends.cuda.enable_cudnn_sdp(False)
            elif variant == "math-attention":
                torch.backends.cuda.enable_cudnn_sdp(False)
                torch.backends.cuda.enable_flash_sdp(False)
                torch.backends.cuda.enable_mem_efficient_sdp(False)
            elif variant == "aot_eager":
                options = {"backend": "aot_eager"}
            changes = {"trainable": {"rank": few.rank, "targets": ["*to_out*"]}} if variant == "no-adapters" else {}
            steps(few, 1 if variant == "math-attention" else 2, folder, options, say, **changes)


def alone(chosen: Any, folder: Path, options: dict[str, Any], say: Any) -> None:
    """The bare student's forward and backward; then the bare reference."""
    import torch

    from liftkit.finetune.network import bind, compile_blocks

    trainer, _, here = trainer_of(chosen, 2, folder)
    compile_blocks(trainer.trainee.transformer, **options)
    x0 = trainer.learner.objective.state(here)
    sigma = torch.full((len(x0),), 0.5, device=x0.device)
    for turn in range(2):
        result = bind(trainer.learner.objective.student, here.prompts)(x0, sigma)
        say(f"student's forward {turn}")
        result.square().mean().backward()
        say(f"student's backward {turn}")
    with torch.no_grad():
        bind(trainer.learner.objective.reference.flow, here.prompts)(here.latents, sigma)
    say("reference")


def guarded(variant: str) -> None:
    """A variant; where it fails, the generated code around the kernel that was last called."""
    try:
        play(variant)
    except Exception as error:
        print(f"{variant}: FAILED: {' '.join(str(error).split())[:200]}")
        for frame in traceback.extract_tb(error.__traceback__)[-6:]:
            print(f"    {frame.filename}:{frame.lineno} {frame.name}: {frame.line}")
            if "inductor" in frame.filename and "/torch/" not in frame.filename and frame.lineno:
                lines = Path(frame.filename).read_text().splitlines()
                print("\n".join(f"      {line}" for line in lines[max(frame.lineno - 12, 0) : frame.lineno + 3]))
                if os.environ.get("OUT"):
                    Path(os.environ["OUT"], f"{variant}-{Path(frame.filename).name}").write_text("\n".join(lines))
        raise SystemExit(1) from None
    print(f"{variant}: passed")


# ------------------------------------------------------------------------------------------------ where time goes


def pieces() -> None:
    """Milliseconds of what a step does, each waited for, and what the profiler counts in one."""
    import torch
    from _gpu_model import batches, device, timed
    from finetune import floor, whole

    from liftkit.finetune.step import draw

    with tempfile.TemporaryDirectory() as name:
        trainer, given, here = trainer_of(scale(1, 4), 4, Path(name))
        x0 = trainer.learner.objective.state(here)
        for _ in range(2):
            floor(trainer, here)
            whole(trainer, given)
        batch = next(given)
        host = next(batches(scale(1, 4), max(scale(1, 4).resolutions), 4))
        noise, _ = draw(tuple(x0.shape), trainer.recipe.noise, 0, 0)
        work = {
            "floor": lambda: floor(trainer, here),
            "whole": lambda: whole(trainer, given),
            "drawing noise": lambda: draw(tuple(x0.shape), trainer.recipe.noise, 0, 0),
            "copying noise": lambda: noise.to(device()),
            "copying the batch": lambda: host.to(device()),
            "gradients": lambda: trainer.learner.gradients(batch),
            "clip": lambda: trainer.learner.clip(0),
            "optimizer": lambda: [optimizer.step() for optimizer in trainer.learner.optimizers],
            "running mean": lambda: trainer.learner.average.update(trainer.learner.parameters, 100),
            "zero": lambda: [optimizer.zero_grad(set_to_none=True) for optimizer in trainer.learner.optimizers],
        }
        for what, call in work.items():
            found = sorted(timed(call) for _ in range(1 if what == "zero" else 3))
            print(f"  {what}: {1000 * found[len(found) // 2]:.1f} ms")
        learning = trainer.learner.parameters.values()
        print(f"  {len(learning)} tensors, {sum(each.numel() for each in learning) / 1e6:.0f} M")
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=kinds) as profile:
            whole(trainer, given)
        key = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        rows = sorted(profile.key_averages(), key=lambda row: -getattr(row, key))
        for row in rows[:22]:
            print(f"  {getattr(row, key) / 1000:9.2f} ms {row.count:6d} x {row.key[:110]}")
        for row in rows:
            if (
                "Synchronize" in row.key
                or "Memcpy" in row.key
                or row.key in ("aten::item", "aten::_local_scalar_dense")
            ):
                print(f"  {row.count:6d} x {row.key}, {row.cpu_time_total / 1000:.1f} ms of the processor")


def proof() -> None:
    """The deviation of a tiny SD3's tied run, its operations computed by other kernels and in float64."""
    from contextlib import nullcontext

    import torch
    from _gpu_model import device

    import liftkit
    from liftkit.conversion.tied import TiedRun
    from liftkit.conversion.verify import full_precision
    from tests import tiny

    with tempfile.TemporaryDirectory() as name:
        torch.manual_seed(0)
        folders = {key: tiny.save(make(), Path(name) / key) for key, make in tiny.PIPELINES.items()}
        pipe = liftkit.models.load.load_component(
            liftkit.checkpoint.model.find_model(str(folders["sd3"])), "transformer", torch.float32
        )
        twin = liftkit.convert_transformer(pipe, tiny.lift())

        def traces(where: Any, dtype: torch.dtype) -> tuple[float, list[Any]]:
            latent, pixel = pipe.to(where, dtype), twin.to(where, dtype)
            run = TiedRun(twin.architecture, dict(pipe.config), tiny.lift(), 8, 0, device=str(where), dtype=dtype)
            run.conditioning = {
                key: value.to(dtype) if getattr(value, "is_floating_point", lambda: False)() else value
                for key, value in run.conditioning.items()
            }
            trace = run.sample_latent(liftkit.open_flow(latent))
            return run.deviation(liftkit.open_flow(pixel), trace), [each.double().cpu() for each in trace]

        kernels = {
            "as it is": nullcontext,
            "plain attention": lambda: torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
            "without cudnn": lambda: torch.backends.cudnn.flags(enabled=False),
        }
        with full_precision(), torch.no_grad():
            _, exact = traces("cpu", torch.float64)
            for what, context in kernels.items():
                for where in dict.fromkeys(["cpu", device().type]):
                    with context():
                        deviation, trace = traces(where, torch.float32)
                    off = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(trace, exact))
                    print(f"  {what}, {where}: deviation {deviation:.2e}; the latent run from float64's {off:.2e}")
            print(f"  float64, {device().type}: deviation {traces(device().type, torch.float64)[0]:.2e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variant")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--only", nargs="*", default=list(VARIANTS))
    chosen = parser.parse_args()
    if chosen.variant:
        {"pieces": pieces, "proof": proof}.get(chosen.variant, lambda: guarded(chosen.variant))()
        return
    end = time.monotonic() + chosen.seconds
    threads = {"TORCHINDUCTOR_COMPILE_THREADS": "3", "OMP_NUM_THREADS": "2"}
    running = {name: start(name, {**threads, **VARIANTS.get(name, {})}) for name in [*chosen.only, "proof"]}
    for name, (process, output) in running.items():
        try:
            process.wait(max(end - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            print(f"{name}: not done")
        print(output.read_text(errors="replace")[-6000:], flush=True)
    process, output = start("pieces", {})
    try:
        process.wait(35)
    except subprocess.TimeoutExpired:
        process.kill()
    print(output.read_text(errors="replace")[-6000:])


def start(name: str, variables: dict[str, str]) -> tuple[Any, Path]:
    output = Path(tempfile.mkdtemp(prefix="liftkit-faults-")) / "output"
    with output.open("wb") as file:
        command = [sys.executable, __file__, "--variant", name]
        process = subprocess.Popen(command, env={**environment(), **variables}, stdout=file, stderr=file)
    return process, output


if __name__ == "__main__":
    main()
