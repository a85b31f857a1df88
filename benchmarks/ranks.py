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
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

PATCH, FULL, DIM, CLASSES = 8, 64, 192, 10
RANKS = (0, 2, 4, 8, 16, 32, DIM)
LEVELS = (0.05, 0.2, 0.4, 0.6, 0.8, 0.95)
FLOOR, SAMPLING_FLOOR, DROPPED = 0.05, 0.04, 0.1


@dataclass(frozen=True)
class Plan:
    """What all runs have in common."""

    data: str
    device: str
    steps: int
    batch: int
    rate: float
    depth: int
    width: int
    samples: int
    sampler_steps: int
    threads: int
    guidance: tuple[float, ...]
    held_out: int
    graphs: bool
    side: int
    noise_mean: float
    noise_std: float
    embeddings: float


def draw_data(path: Path, count: int, held_out: int) -> None:
    """Draw the demonstration data, and keep them."""
    from liftkit.data import demo

    parts: dict[str, Any] = {}
    for name, many, split in (("train", count, "train"), ("test", held_out, "heldout")):
        images, scenes = demo.images(many, split=split)  # type: ignore[arg-type]
        parts[name] = images.transpose(0, 3, 1, 2)
        parts[f"{name}_labels"] = np.asarray([(s.digit, s.color, s.background) for s in scenes], dtype=np.int64)
    np.savez_compressed(path, **parts)


def signed(images: np.ndarray, device: str) -> Tensor:
    """uint8 images to [-1, 1]."""
    return torch.from_numpy(images).to(device).float() / 127.5 - 1.0


def principal(images: np.ndarray) -> Tensor:
    """All eigenvectors of the patches' second moments, largest first, (D, D) float64."""
    from liftkit.tokens import patchify

    gram = torch.zeros(DIM, DIM, dtype=torch.float64)
    for part in np.array_split(images, max(1, len(images) // 256)):
        tokens = patchify(signed(part, "cpu").double(), PATCH).reshape(-1, DIM)
        gram += tokens.T @ tokens
    return torch.linalg.eigh(gram)[1].flip(1)


class Student:
    """A network and how its answer becomes a velocity."""

    def __init__(self, plan: Plan, basis: Tensor, seed: int) -> None:
        from liftkit.models.jit import JiTTransformer2DModel

        torch.manual_seed(seed)
        self.model = JiTTransformer2DModel(
            sample_size=plan.side,
            patch_size=PATCH,
            num_layers=plan.depth,
            num_attention_heads=plan.width // 64,
            attention_head_dim=64,
            bottleneck_dim=64,
            num_classes=CLASSES,
            context_tokens=8,
            context_start=2,
            upcast_attention=False,
        )
        if basis.shape[1] <= 64:
            self.model.begin_with(basis)
        self.model = self.model.to(plan.device)
        self.basis, self.device, self.side = basis.float().to(plan.device), plan.device, plan.side

    def velocity(self, x_t: Tensor, sigma: Tensor, labels: Tensor, floor: float) -> Tensor:
        """u = eps - x_0."""
        from liftkit.asymflow import recover_velocity
        from liftkit.tokens import patchify, unpatchify

        with torch.autocast(torch.device(self.device).type, torch.bfloat16, cache_enabled=False):
            answer = self.model(x_t, sigma, labels, return_dict=False)[0]
        tokens = recover_velocity(
            patchify(answer.float(), PATCH), patchify(x_t, PATCH), sigma, self.basis, 1.0, sigma_min=floor
        )
        return unpatchify(tokens, PATCH, self.side, self.side)


class Training:
    """One run: static buffers, so that a step can be captured as a CUDA graph.

    Args:
        plan: of all runs.
        rank, seed: of this one.
        images: uint8 (n, 3, side, side) on the device.
        digits: (n,) on the device.
        basis: (D, D), of which the first ``rank`` columns are taken.
    """

    def __init__(self, plan: Plan, rank: int, seed: int, images: Tensor, digits: Tensor, basis: Tensor) -> None:
        self.plan, self.images, self.digits = plan, images, digits
        self.student = Student(plan, basis[:, :rank], seed)
        device, size = plan.device, plan.batch
        self.generator = torch.Generator(device).manual_seed(seed + 1)
        self.x0 = torch.zeros(size, 3, plan.side, plan.side, device=device)
        self.noise, self.sigma = torch.zeros_like(self.x0), torch.zeros(size, device=device)
        self.labels = torch.zeros(size, dtype=torch.long, device=device)
        self.loss = torch.zeros((), device=device)
        self.total = torch.zeros((), device=device)
        self.parameters = list(self.student.model.parameters())
        graphed = plan.graphs
        model = self.student.model
        small = {*model.class_embed.parameters(), *model.time_embed.parameters()}
        self.groups = [
            {"params": [p for p in self.parameters if (p in small) == wanted], "factor": factor}
            for wanted, factor in ((False, 1.0), (True, plan.embeddings))
        ]
        rate = torch.tensor(plan.rate, device=device) if graphed else plan.rate
        self.optimizer = torch.optim.AdamW(
            self.groups, lr=rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True, capturable=graphed
        )
        for group in self.optimizer.param_groups if graphed else ():
            group["lr"] = group["lr"].clone()  # each group's own number, which a graph reads
        self.average = [p.detach().clone() for p in self.parameters]
        self.kept = 1.0 - 1.0 / max(0.05 * plan.steps, 10)
        self.graph: torch.cuda.CUDAGraph | None = None

    def feed(self) -> None:
        """Draw a batch into the buffers."""
        size, generator, device = self.plan.batch, self.generator, self.plan.device
        rows = torch.randint(len(self.images), (size,), generator=generator, device=device)
        self.x0.copy_(self.images[rows].float() / 127.5 - 1.0)
        dropped = torch.rand(size, generator=generator, device=device) < DROPPED
        self.labels.copy_(torch.where(dropped, CLASSES, self.digits[rows]))
        self.noise.normal_(generator=generator)
        self.sigma.normal_(generator=generator)
        self.sigma.mul_(self.plan.noise_std).add_(self.plan.noise_mean).sigmoid_().clamp_(min=1e-4)

    def compute(self) -> None:
        """Loss, gradients, step, average; of the buffers alone."""
        self.optimizer.zero_grad(set_to_none=True)
        x_t = torch.lerp(self.x0, self.noise, self.sigma.view(-1, 1, 1, 1))
        u = self.student.velocity(x_t, self.sigma, self.labels, 1e-6)
        weight = (self.sigma / self.sigma.clamp(min=FLOOR)).view(-1, 1, 1, 1)
        loss = (weight * (u - (self.noise - self.x0))).square().mean()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.parameters, 1.0 - self.kept)
        self.loss.copy_(loss.detach())
        self.total.add_(self.loss)

    def capture(self) -> None:
        """Record a step; the weights are put back to where they began."""
        before = [p.detach().clone() for p in self.parameters]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.feed()
                self.compute()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.compute()
        with torch.no_grad():
            for parameter, value, average in zip(self.parameters, before, self.average):
                parameter.copy_(value)
                average.copy_(value)
            for state in self.optimizer.state.values():
                for tensor in state.values():
                    tensor.zero_()

    def step(self, index: int) -> None:
        """One optimizer step."""
        rate = self.plan.rate * min(1.0, (index + 1) / max(0.05 * self.plan.steps, 1.0))
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate * group["factor"])
            else:
                group["lr"] = rate * group["factor"]
        self.feed()
        if self.graph is not None:
            self.graph.replay()
        else:
            self.compute()

    def run(self) -> list[float]:
        """All steps; the mean loss of each eighth."""
        self.generator.manual_seed(self.generator.initial_seed())
        eighth, losses = max(1, self.plan.steps // 8), []
        self.student.model.train()
        for index in range(self.plan.steps):
            self.step(index)
            if (index + 1) % eighth == 0:
                losses.append(self.total.item() / eighth)
                self.total.zero_()
        with torch.no_grad():
            for parameter, average in zip(self.parameters, self.average):
                parameter.copy_(average)
        self.student.model.eval()
        return losses


@torch.no_grad()
def errors(student: Student, images: Tensor, digits: Tensor) -> dict[str, float]:
    """Mean |x_0 - xhat_0|^2 by noise level."""
    found = {}
    for number, level in enumerate(LEVELS):
        generator = torch.Generator(images.device).manual_seed(1000 + number)
        noise = torch.randn(images.shape, generator=generator, device=images.device)
        total = 0.0
        for x0, eps, label in zip(images.split(256), noise.split(256), digits.split(256)):
            sigma = torch.full((len(x0),), level, device=x0.device)
            x_t = torch.lerp(x0, eps, level)
            denoised = x_t - level * student.velocity(x_t, sigma, label, 1e-6)
            total += (x0 - denoised).square().sum().item()
        found[f"{level:g}"] = total / images.numel()
    return found


@torch.no_grad()
def samples(student: Student, count: int, steps: int, guidance: float, seed: int) -> Tensor:
    """Heun's method from the same noise for every rank, Euler's at last; digits in turn. (n, 3, side, side) in [-1, 1], CPU."""
    device, made = student.device, []
    grid = [1.0 - index / steps for index in range(steps)] + [0.0]
    labels = torch.arange(count, device=device) % CLASSES
    generator = torch.Generator(device).manual_seed(seed)
    noise = torch.randn((count, 3, student.side, student.side), generator=generator, device=device)

    def velocity(x: Tensor, level: float, label: Tensor) -> Tensor:
        sigma = torch.full((len(x),), level, device=device)
        if guidance == 1.0 or level > 0.88:
            return student.velocity(x, sigma, label, SAMPLING_FLOOR)
        both = torch.cat([label, torch.full_like(label, CLASSES)])
        found = student.velocity(torch.cat([x, x]), torch.cat([sigma, sigma]), both, SAMPLING_FLOOR)
        conditional, free = found.chunk(2)
        return free + guidance * (conditional - free)

    for x, label in zip(noise.split(512), labels.split(512)):
        for now, after in zip(grid[:-1], grid[1:]):
            u = velocity(x, now, label)
            ahead = x + (after - now) * u
            if after > 0.0:
                ahead = x + (after - now) * 0.5 * (u + velocity(ahead, after, label))
            x = ahead
        made.append(x.clamp(-1.0, 1.0).cpu())
    return torch.cat(made)


def judged(images: Tensor, reference: Tensor) -> dict[str, float]:
    """What the oracle reads, and distances to held-out images; smaller images than the oracle's are enlarged for it."""
    from liftkit.data.oracle import load_oracle
    from liftkit.evaluate.features import texture_features
    from liftkit.evaluate.patches import frechet, gaussian, patch_frechet

    oracle = load_oracle()
    images, reference = (F.interpolate(x, (FULL, FULL), mode="bicubic").clamp(-1.0, 1.0) for x in (images, reference))
    with torch.no_grad():
        wanted = torch.arange(len(images)) % CLASSES
        read = torch.cat([oracle(part)[0].argmax(1) for part in images.split(256)])
        features = [torch.cat([oracle.features(p) for p in each.split(256)]) for each in (images, reference)]
    return {
        "digit": (read == wanted).float().mean().item(),
        "oracle_frechet": frechet(*map(gaussian, features)),
        "texture_frechet": frechet(gaussian(texture_features(images)), gaussian(texture_features(reference))),
        "patch_frechet": patch_frechet(images, reference),
    }


def load(plan: Plan) -> tuple[dict[str, np.ndarray], Tensor]:
    """The data, and the principal directions of the training part."""
    found = dict(np.load(plan.data))
    if plan.side < FULL:
        by = FULL // plan.side
        for name in ("train", "test"):
            cells = found[name].reshape(-1, 3, plan.side, by, plan.side, by).astype(np.float32)
            found[name] = np.rint(cells.mean((3, 5))).astype(np.uint8)
    found |= {name: found[name][: plan.held_out] for name in ("test", "test_labels")}
    return found, principal(found["train"])


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


def step_seconds(plan: Plan) -> float:
    """Seconds of a step where one run has the device to itself."""
    data, basis = load(plan)
    images, digits = (torch.from_numpy(each).to(plan.device) for each in (data["train"], data["train_labels"][:, 0]))
    training = Training(plan, 8, 0, images, digits, basis)
    if plan.graphs:
        training.capture()
    count = 60 if plan.device != "cpu" else 3
    for index in range(count // 3):
        training.step(index)
    if plan.device != "cpu":
        torch.cuda.synchronize()
    began = time.monotonic()
    for index in range(count):
        training.step(index)
    training.loss.item()
    return (time.monotonic() - began) / count


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


def spectrum(images: np.ndarray, basis: Tensor) -> list[float]:
    """Second moments of the patches along their principal directions, largest first."""
    from liftkit.tokens import patchify

    tokens = patchify(signed(images[:2048], "cpu").double(), PATCH).reshape(-1, DIM)
    return (tokens @ basis).square().mean(0).tolist()


if __name__ == "__main__":
    main()
