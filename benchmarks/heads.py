"""Paired finetunes of tiny-klein with and without a detail head: python benchmarks/heads.py --output OUT

Runs of a seed share images, their order, noise and noise levels. All train beside each other on one device; then ``liftkit
compare`` puts them into one table: OUT/compare.json and compare.html, beside each run's log.jsonl and its transformer.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VARIANTS = {"head": ["trainable.head={}"], "plain": ["trainable.head=null"]}


def liftkit(*arguments: object, threads: int = 4) -> subprocess.Popen[bytes]:
    """A command of liftkit in a process of its own, silent but for errors."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)}
    return subprocess.Popen([sys.executable, "-m", "liftkit", "-q", *map(str, arguments)], env=environment)


def wait(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Raise unless all of them do their work."""
    for process in processes:
        if process.wait():
            raise SystemExit(f"{process.args}: ended with {process.returncode}")


def main() -> None:
    """Convert, train all, compare; say how long each part took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("build/heads"), help="conversion, cache and runs")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=16384)
    parser.add_argument("--count", type=int, default=512, help="samples of each model; 0: no comparison")
    parser.add_argument("--device", default="cuda", help="of the comparison")
    parser.add_argument("--threads", type=int, default=2, help="of each training")
    chosen = parser.parse_args()
    began = time.monotonic()
    chosen.output.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(chosen.work, ignore_errors=True)
    chosen.work.mkdir(parents=True)
    pixel = chosen.work / "pixel"
    wait([liftkit("convert", "demo", "--images", "demo", "-o", pixel)])
    common = [
        f"model={pixel}", f"data.cache={chosen.work / 'cache'}", f"data.sources=[{{kind: demo, count: {chosen.images}}}]",
        f"threads={chosen.threads}", "previews.every=0", "validation.every=0", "checkpoints.every=0",
    ]  # fmt: skip

    def train(name: str, seed: int, steps: int, *more: str, threads: int = chosen.threads) -> subprocess.Popen[bytes]:
        own = [f"output={chosen.work / name}", f"seed={seed}", f"steps={steps}"]
        return liftkit("finetune", "tiny-klein", *common, *own, *more, threads=threads)

    # One fills the cache, so that not all do.
    wait([train("cache-filler", 0, 1, "data.workers=8", "threads=8", threads=8)])
    print(f"converted and encoded: {time.monotonic() - began:.0f} s", flush=True)
    names = [(f"{variant}-{seed}", seed, more) for seed in range(chosen.seeds) for variant, more in VARIANTS.items()]
    wait([train(name, seed, chosen.steps, *more) for name, seed, more in names])
    print(f"trained: {time.monotonic() - began:.0f} s", flush=True)
    for name, _, _ in names:
        shutil.copy2(chosen.work / name / "log.jsonl", chosen.output / f"{name}.jsonl")
        shutil.copytree(chosen.work / name / "model" / "transformer", chosen.output / name, dirs_exist_ok=True)
    if chosen.count:
        pages = ["--json", chosen.output / "compare.json", "--html", chosen.output / "compare.html"]
        models = [chosen.work / name / "model" for name, _, _ in names]
        labels = [word for name, _, _ in names for word in ("--label", name)]
        wait([liftkit("compare", "demo", *models, *labels, "-n", chosen.count, "--device", chosen.device, "--batch-size", 128,
                      *pages, threads=12)])  # fmt: skip
    print(f"compared: {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
