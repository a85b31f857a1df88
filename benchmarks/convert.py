"""What a conversion costs beyond its floor, `cp` of the same files: python -m benchmarks convert [--size 8GB]

Makes a sharded checkpoint of random numbers in the shape of FLUX.2 klein 4B (or smaller, for less than 8 GB), then measures
in turns, so that a drifting machine disturbs all alike, each in a process of its own:

* `cp` of the transformer's files, and the sync that makes them durable;
* `liftkit convert` with a saved lift: plan, rewriting, hashing all bytes, proof on the projections, report, sync and
  rename; the clock starts when the libraries are imported, matplotlib among them;
* loading everything, rewriting the projections in memory and saving, synced.

Bars: at least cp's throughput, beside as many busy processes as ``--busy`` says, and less than 700 MB of resident memory at the
peak. A conversion's plan, proof and
report take about a second whatever the size, so that the first is for checkpoints of 1 GB and more. The files lie in the
page cache where that holds them; what it cannot hold comes from the disk for all three.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from _table import Row, add_option, finish

THROUGHPUT, MEMORY = 1.0, 700_000_000
FROM_BYTES = 1_000_000_000
SHARDS = 4
KLEIN_4B: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 128,
    "num_layers": 5,
    "num_single_layers": 20,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
    "timestep_guidance_channels": 256,
    "mlp_ratio": 3.0,
    "axes_dims_rope": [32, 32, 32, 32],
    "rope_theta": 2000,
    "guidance_embeds": False,
}
KLEIN_9B = {
    **KLEIN_4B,
    "num_layers": 8,
    "num_single_layers": 24,
    "num_attention_heads": 32,
    "joint_attention_dim": 12288,
}


# ------------------------------------------------------------------------------------------- the checkpoint


def make(folder: Path, size: int) -> None:
    """A FLUX.2-klein pipeline without text side, its transformer random bfloat16 of about ``size`` bytes, and a lift."""
    import torch
    from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler

    from liftkit.lift import Lift

    AutoencoderKLFlux2(block_out_channels=(8, 8, 8, 8), norm_num_groups=4).save_pretrained(folder / "vae")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    absent = {"text_encoder": [None, None], "tokenizer": [None, None]}
    parts = {
        "transformer": "Flux2Transformer2DModel",
        "vae": "AutoencoderKLFlux2",
        "scheduler": "FlowMatchEulerDiscreteScheduler",
    }
    index = {"_class_name": "Flux2KleinPipeline", **absent, **{key: ["diffusers", name] for key, name in parts.items()}}
    (folder / "model_index.json").write_text(json.dumps(index))
    config = shaped(size)
    (folder / "transformer").mkdir()
    (folder / "transformer" / "config.json").write_text(json.dumps({"_class_name": parts["transformer"], **config}))
    write_random(folder / "transformer", shapes(config))
    basis = torch.linalg.qr(torch.randn(768, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    Lift(basis.float(), 2.4).save(folder.parent / "lift.safetensors")


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors, from a model without memory."""
    from accelerate import init_empty_weights
    from diffusers import Flux2Transformer2DModel

    with init_empty_weights():
        return {key: tuple(value.shape) for key, value in Flux2Transformer2DModel(**config).state_dict().items()}


def shaped(size: int) -> dict[str, Any]:
    """klein 4B's config, with fewer heads and layers where its 7.8 GB are more than ``size``."""
    if size >= 7_500_000_000:
        return KLEIN_4B
    for heads in (24, 12, 6):
        config = {**KLEIN_4B, "num_attention_heads": heads, "num_layers": 1, "num_single_layers": 1}
        one, two = (total(shapes({**config, "num_single_layers": count})) for count in (1, 2))
        if one <= size:
            return {**config, "num_single_layers": 1 + (size - one) // (two - one)}
    return config


def total(found: dict[str, tuple[int, ...]]) -> int:
    """Bytes in bfloat16."""
    from math import prod

    return sum(2 * prod(shape) for shape in found.values())


def write_random(folder: Path, found: dict[str, tuple[int, ...]]) -> None:
    """Shards of about equal size, in pieces of 16 MB: random bfloat16 numbers below 2 in size."""
    import numpy as np

    from liftkit.checkpoint.header import TensorEntry, encode_header, tensor_bytes
    from liftkit.checkpoint.model import STEM

    limit = -(-total(found) // SHARDS)
    shards: list[dict[str, TensorEntry]] = [{}]
    position = 0
    for name, shape in found.items():
        if position >= limit:
            shards.append({})
            position = 0
        end = position + tensor_bytes("BF16", shape)
        shards[-1][name] = TensorEntry("BF16", shape, position, end)
        position = end
    random, where = np.random.default_rng(0), {}
    for number, entries in enumerate(shards, 1):
        path = folder / f"{STEM}-{number:05d}-of-{len(shards):05d}.safetensors"
        where |= dict.fromkeys(entries, path.name)
        rest = max(entry.end for entry in entries.values())
        with path.open("wb") as file:
            file.write(encode_header(entries, {"format": "pt"}))
            while rest:
                count = min(rest, 1 << 24)
                bits = random.integers(0, 2**63, count // 8 + 1, dtype=np.uint64) & np.uint64(0xBFFFBFFFBFFFBFFF)
                file.write(bits.view(np.uint8)[:count].data)
                rest -= count
    content = {"metadata": {"total_size": total(found)}, "weight_map": where}
    (folder / f"{STEM}.safetensors.index.json").write_text(json.dumps(content))


# ------------------------------------------------------------------------------------------- what is measured


def copy(source: Path, target: Path) -> dict[str, float]:
    """`cp` of the transformer's files, then the same sync as a conversion's."""
    target.mkdir()
    settle(source, target)
    start = time.perf_counter()
    subprocess.run(["cp", "-R", str(source / "transformer"), str(target)], check=True)
    sync(target)
    return {"seconds": time.perf_counter() - start}


def convert(source: Path, target: Path) -> dict[str, float]:
    """Our conversion, whole."""
    import matplotlib.backends.backend_svg
    import matplotlib.figure  # noqa: F401
    import torch

    import liftkit
    from liftkit.checkpoint import rewrite  # noqa: F401
    from liftkit.conversion import execute  # noqa: F401

    before, threads = resident(), torch.get_num_threads()
    settle(source, target)
    start = time.perf_counter()
    liftkit.convert(str(source), target, lift=source.parent / "lift.safetensors", device="cpu", proof="projections")
    return {"seconds": time.perf_counter() - start, "imported": before, "threads": threads}


def load_and_save(source: Path, target: Path) -> dict[str, float]:
    """Everything in memory at once."""
    import torch
    from safetensors.torch import load_file, save_file

    from liftkit.lift import Lift
    from liftkit.models.registry import architecture
    from liftkit.models.surgery import lifted_tensors

    target.mkdir()
    settle(source, target)
    start = time.perf_counter()
    paths = sorted((source / "transformer").glob("*.safetensors"))
    files: dict[str, dict[str, torch.Tensor]] = {path.name: load_file(path) for path in paths}
    state = {name: tensor for tensors in files.values() for name, tensor in tensors.items()}
    lift = Lift.load(source.parent / "lift.safetensors")
    changed = lifted_tensors(architecture("Flux2Transformer2DModel"), state.get, lift)
    for name, tensors in files.items():
        save_file({key: changed.get(key, value) for key, value in tensors.items()}, target / name)
    sync(target)
    return {"seconds": time.perf_counter() - start}


ROLES: dict[str, Callable[[Path, Path], dict[str, float]]] = {
    "cp": copy,
    "liftkit convert": convert,
    "load and save": load_and_save,
}


def settle(source: Path, target: Path) -> None:
    """Copy the files once and remove them, so that all begin alike: the files are in the page cache, and as much memory
    is free and at hand. A virtual machine's host takes free memory back within a second or two, and whoever touches it
    next waits for it."""
    trial = target.with_name("trial")
    shutil.copytree(source / "transformer", trial)
    shutil.rmtree(trial)


def sync(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def resident() -> int:
    """Bytes resident at the peak so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(role: str, source: Path, target: Path) -> dict[str, float]:
    """One run in a process of its own; its output goes, and the disk is at rest before the next."""
    command = [sys.executable, __file__, "--role", role, str(source), str(target)]
    start = time.perf_counter()
    # As the command line has it: waiting threads that spin take the processor from those that copy and hash.
    quiet = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=quiet)
    found = json.loads(done.stdout.splitlines()[-1])
    found["with start-up"] = time.perf_counter() - start
    shutil.rmtree(target)
    os.sync()
    return found


def play(role: str, source: Path, target: Path) -> None:
    """In the process of its own."""
    found = ROLES[role](source, target)
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    found |= {"peak": resident(), "cpu": sum(each.ru_utime + each.ru_stime for each in used)}
    print(json.dumps(found))


def fitting(folder: Path, wanted: int) -> int:
    """The size asked for, or what the disk holds twice."""
    free = shutil.disk_usage(folder).free - 1_000_000_000
    if 2 * wanted > free:
        print(f"the disk has room for {free / 2e9:.1f} GB twice, not for {wanted / 1e9:.1f} GB")
    return min(wanted, free // 2)


def parse_size(text: str) -> int:
    units = {"MB": 10**6, "GB": 10**9}
    return round(float(text[:-2]) * units[text[-2:].upper()])


def main() -> None:
    parser = argparse.ArgumentParser(description="A conversion against cp.")
    parser.add_argument("--size", type=parse_size, default=parse_size("200MB"), help="such as 200MB or 8GB")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--busy", type=int, default=0, help="processes that compute meanwhile")
    parser.add_argument("--brief", action="store_true", help="without loading and saving everything")
    parser.add_argument("--folder", type=Path, default=None, help="where to work; it needs twice the size")
    parser.add_argument("--role", choices=["make", *ROLES], help=argparse.SUPPRESS)
    add_option(parser)
    parser.add_argument("places", nargs="*", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.role == "make":
        make(arguments.places[0], arguments.size)
    elif arguments.role:
        play(arguments.role, *arguments.places)
    else:
        with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="liftkit-benchmark-") as folder:
            busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(arguments.busy)]
            try:
                roles = list(ROLES)[: 2 if arguments.brief else None]
                row = compare(Path(folder), arguments.size, arguments.rounds, roles)
            finally:
                for each in busy:
                    each.kill()
            beside = f"beside {len(busy)} busy processes" if busy else "beside no other work of its own"
            finish([replace(row, note=f"{row.note}, {beside}")], arguments.rows)


def compare(folder: Path, size: int, rounds: int, roles: list[str]) -> Row:
    """Measure in turns, print all, and give the row of the table."""
    source = folder / "model"
    source.mkdir()
    size = fitting(folder, size)
    subprocess.run([sys.executable, __file__, "--role", "make", "--size", f"{size / 1e6}MB", str(source)], check=True)
    os.sync()
    weights = sum(path.stat().st_size for path in (source / "transformer").iterdir())
    print(f"torch {version('torch')}, {os.cpu_count()} processors, {platform.machine()}, {platform.system()}")
    print(
        f"{weights / 1e9:.2f} GB in {len(list((source / 'transformer').glob('*.safetensors')))} shards, {rounds} rounds"
    )
    runs: dict[str, list[dict[str, float]]] = {role: [] for role in roles}
    for turn in range(rounds + 1):
        # Each goes first in turn: what ran before decides on the memory that is free.
        order = [roles[(turn + place) % len(roles)] for place in range(len(roles))]
        for role in order:
            found = measure(role, source, folder / "out")
            # The first round brings files and libraries into the cache.
            if turn:
                runs[role].append(found)
    ratios = {}
    for role, found in runs.items():
        seconds, peak = (statistics.median(run[key] for run in found) for key in ("seconds", "peak"))
        ratios[role] = statistics.median(floor["seconds"] / run["seconds"] for floor, run in zip(runs["cp"], found))
        print(
            f"{role:16s} {seconds:7.2f} s ({min(run['seconds'] for run in found):.2f} to "
            f"{max(run['seconds'] for run in found):.2f})  {weights / seconds / 1e9:5.2f} GB/s  {ratios[role]:5.2f} of cp  "
            f"peak {peak / 1e6:6.0f} MB  cpu {statistics.median(run['cpu'] for run in found):6.2f} s  "
            f"with start-up {statistics.median(run['with start-up'] for run in found):6.2f} s"
        )
    ours = runs["liftkit convert"]
    peak = max(run["peak"] for run in ours)
    print(f"memory beyond the imported libraries: {max(run['peak'] - run['imported'] for run in ours) / 1e6:.0f} MB")
    ratio = ratios["liftkit convert"]
    verdict("peak under", f"{MEMORY / 1e6:.0f} MB: {peak / 1e6:.0f}", peak < MEMORY)
    if weights >= FROM_BYTES:
        verdict("throughput at least", f"{THROUGHPUT} of cp's: {ratio:.2f}", ratio >= THROUGHPUT)
    seconds = {role: statistics.median(run["seconds"] for run in found) for role, found in runs.items()}
    note = f"{weights / 1e9:.2f} GB, throughput, median of {rounds} rounds, peak {peak / 1e6:.0f} MB"
    return Row(
        "convert / cp", seconds["cp"], seconds["liftkit convert"], "s", ratio, THROUGHPUT, at_least=True, note=note
    )


def verdict(what: str, figures: str, met: bool) -> None:
    print(f"{'met' if met else 'MISSED'}: {what} {figures}")


if __name__ == "__main__":
    main()
