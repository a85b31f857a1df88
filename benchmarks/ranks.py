r"""Which rank a small pixel model wants that is trained from nothing: python benchmarks/ranks.py --data ranks.npz --json ranks.json

Networks of JiT's kind (depth 6, width 192, patches of 8 x 8, so that D = 192) are trained on the demonstration data at equal
steps, one for each rank and seed. Runs of a seed share data order, noise, noise levels and their first weights, but for the rows
that read the subspace. Each is judged with its averaged weights: by the squared error of held-out images by noise level, and on
samples (Heun's method) by what the oracle reads and by Frechet distances.

The data are drawn once and kept: python benchmarks/ranks.py --data ranks.npz --draw. On a GPU the number of steps
follows from ``--seconds``; several processes train beside each other. On a CPU give ``--steps``, and a task that it can do in
minutes, such as

    python benchmarks/ranks.py --data ranks.npz --json ranks.json --device cpu --processes 1 --threads 1 --side 32 --depth 4 \
        --width 128 --batch 64 --steps 300 --noise-mean 1 --embeddings 5 --samples 320 --sampler-steps 16 --guidance 3

A run that is done is kept beside the results, in ``ranks.rows``, so that the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from _ranks_data import DIM, FULL, Plan, draw_data, load, signed, spectrum  # noqa: E402
from _ranks_judging import errors, judged, samples  # noqa: E402
from _ranks_training import Training, step_seconds  # noqa: E402

RANKS = (0, 2, 4, 8, 16, 32, DIM)


def work(plan: Plan, jobs: list[tuple[int, int]], output: Path, until: float) -> None:
    """Some runs, one after another; each leaves a file when it is done."""
    torch.set_num_threads(plan.threads)
    torch.backends.cuda.matmul.allow_tf32 = True
    data, basis = load(plan)
    device = plan.device
    images, digits = torch.from_numpy(data["train"]).to(device), torch.from_numpy(data["train_labels"][:, 0]).to(device)
    held, held_digits = signed(data["test"], device), torch.from_numpy(data["test_labels"][:, 0]).to(device)
    for rank, seed in jobs:
        path = output / f"rank-{rank}-seed-{seed}.json"
        if path.is_file():
            continue
        if time.time() > until:
            break
        began = time.monotonic()
        training = Training(plan, rank, seed, images, digits, basis)
        if plan.graphs:
            training.capture()
        losses = training.run()
        trained = time.monotonic() - began
        row: dict[str, Any] = {"rank": rank, "seed": seed, "steps": plan.steps, "losses": losses}
        row["errors"] = errors(training.student, held, held_digits)
        for guidance in plan.guidance:
            made = samples(training.student, plan.samples, plan.sampler_steps, guidance, 7)
            row[f"guidance_{guidance:g}"] = judged(made, held.cpu())
        row |= {"train_seconds": round(trained, 1), "seconds": round(time.monotonic() - began, 1)}
        path.write_text(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


def _at(place: tuple[str, str], run: dict[str, Any]) -> float:
    return float(run[place[0]][place[1]])


def table(record: dict[str, Any]) -> str:
    """A table of what was measured, mean and standard deviation over seeds; in Markdown."""
    guidances = [key for key in record["runs"][0] if key.startswith("guidance_")]
    levels = list(record["runs"][0]["errors"])
    columns: dict[str, Callable[..., float]] = {"loss at the end": lambda run: run["losses"][-1]}
    columns |= {f"error at {level}": partial(_at, ("errors", level)) for level in levels}
    for key in guidances:
        for figure in ("digit", "oracle_frechet", "texture_frechet", "patch_frechet"):
            columns[f"{figure.replace('_', ' ')}, {key.replace('_', ' ')}"] = partial(_at, (key, figure))
    ranks = sorted({run["rank"] for run in record["runs"]})
    lines = [f"| | {' | '.join(f'r = {rank}' for rank in ranks)} |", f"|---|{'---:|' * len(ranks)}"]
    for name, read in columns.items():
        cells = []
        for rank in ranks:
            values = [read(run) for run in record["runs"] if run["rank"] == rank]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.3g} ± {spread:.2g}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    """What was asked for on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="ranks.npz", help="the drawn data (%(default)s)")
    parser.add_argument("--table", type=Path, help="print the table of a results file, and stop")
    parser.add_argument("--draw", action="store_true", help="draw the data and stop")
    parser.add_argument("--count", type=int, default=4096, help="training images to draw (%(default)s)")
    parser.add_argument("--json", type=Path, default=Path("ranks.json"), help="where results go (%(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--seconds", type=float, default=180.0, help="for all runs, where no steps are given (%(default)s)"
    )
    parser.add_argument("--steps", type=int, help="of each run; left out, they follow from --seconds")
    parser.add_argument("--ranks", type=int, nargs="+", default=list(RANKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument(
        "--side", type=int, default=FULL, choices=(32, 64), help="of the images, in pixels (%(default)s)"
    )
    parser.add_argument("--noise-mean", type=float, default=0.8)
    parser.add_argument("--noise-std", type=float, default=0.8)
    parser.add_argument("--embeddings", type=float, default=1.0, help="rate of class and time, in times (%(default)s)")
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--sampler-steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 2.0])
    parser.add_argument("--held-out", type=int, default=512)
    parser.add_argument("--graphs", action=argparse.BooleanOptionalAction, help="CUDA graphs (on, where there is CUDA)")
    parser.add_argument("--processes", type=int, default=5)
    parser.add_argument("--threads", type=int, default=3)
    given = parser.parse_args()
    given.graphs = given.device != "cpu" if given.graphs is None else given.graphs
    return given


def main() -> None:
    """Run all, and write what was found."""
    given = arguments()
    if given.table:
        print(table(json.loads(given.table.read_text())))
    elif given.draw:
        draw_data(Path(given.data), given.count, given.held_out)
    else:
        measure(given)


def measure(given: argparse.Namespace) -> None:
    """Train and judge all runs, and write their results."""
    began = time.time()
    jobs = [(rank, seed) for seed in given.seeds for rank in given.ranks]
    plan, alone = make_plan(given, len(jobs), began)
    print(f"{plan.steps} steps, {len(jobs)} runs, {alone} s a step alone", flush=True)
    folder = given.json.with_suffix(".rows")
    folder.mkdir(parents=True, exist_ok=True)
    share(plan, jobs, folder, began + 2.5 * given.seconds if given.steps is None else float("inf"), given.processes)
    rows = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    device = torch.cuda.get_device_name() if plan.device != "cpu" else platform.processor() or platform.machine()
    data, basis = load(plan)
    record = {
        "format": "liftkit.benchmark.ranks",
        "version": 1,
        "machine": {"device": device, "torch": torch.__version__},
        "plan": {**asdict(plan), "data": Path(plan.data).name},
        "step_seconds_alone": alone,
        "seconds": round(time.time() - began, 1),
        "spectrum": spectrum(data["train"], basis),
        "runs": sorted(rows, key=lambda row: (row["rank"], row["seed"])),
    }
    given.json.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{len(rows)} of {len(jobs)} runs in {record['seconds']} s: {given.json}")


def make_plan(given: argparse.Namespace, runs: int, began: float) -> tuple[Plan, float | None]:
    """What all runs have in common, and the seconds of a step where the number of steps follows from them."""
    shared = {name: getattr(given, name) for name in Plan.__dataclass_fields__ if name != "steps"}
    plan = Plan(steps=given.steps or 1000, **shared)
    if given.steps is not None:
        return plan, None
    alone = step_seconds(plan)
    # Sampling and judging take about 8 s a run; processes hide some of each other's waiting.
    left = given.seconds - (time.time() - began) - 8.0 * runs / given.processes - 15.0
    return Plan(steps=max(100, int(left / runs / alone)), **shared), alone


def share(plan: Plan, jobs: list[tuple[int, int]], folder: Path, until: float, count: int) -> None:
    """Let processes work through jobs."""
    if count == 1:
        work(plan, jobs, folder, until)
        return
    import torch.multiprocessing as processes

    context = processes.get_context("spawn")
    workers = [context.Process(target=work, args=(plan, jobs[number::count], folder, until)) for number in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


if __name__ == "__main__":
    main()
