r"""What liftkit does on a GPU, in at most 10 minutes: python benchmarks/gpu.py

In sections, each a process of its own with a share of the time, so that none can spoil another: the tests that need a GPU; a
sampling step of a FLUX.2-klein-4B-shaped model and of its pixel twin; finetuning steps beside the bare networks; their memory
with each way to hold the frozen base, beside its estimate, and that of a FLUX.2-klein-9B-shaped model in 24 GB; the fit's
throughput with a FLUX.2-sized VAE; a conversion against `cp`. Results are written to --json after every row, and a table is
printed at the end. A row that fails holds its error, and the others go on.

Models are made of random numbers on the device, and nothing is downloaded. For a machine without network that has Python,
torch >= 2.6 and transformers, fetch the other packages elsewhere, for its version of Python, and take the folder along:

    grep -vE '^(torch=|triton|nvidia|mypy|ast_serialize|librt|ruff|types)' constraints.txt > wheels.txt
    pip download --no-deps --only-binary :all: --python-version 3.12 --platform manylinux_2_28_x86_64 \
        --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -d wheels -r wheels.txt

Then, on the machine, where this checkout itself need not be installed:

    pip install --no-index --no-deps wheels/*.whl
    python benchmarks/gpu.py --json gpu.json

How operations are counted: those of matrix products and attention of the bare networks, two for each multiplication and
addition, by torch's counter: student forward and backward (frozen weights have no gradient) and reference forward. What
gradient checkpointing computes again does not count. Utilization (MFU) is their rate as a share of the device's dense
bfloat16 peak. Ratios are medians over pairs measured in turns.

Without a GPU it measures nothing. With --tiny everything runs with tiny shapes, on a CPU too, to see that it works.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from _gpu_report import BUDGETS, ROOT, Row, table

SECONDS = 600.0


def machine() -> dict[str, Any]:
    """The exact device and versions."""
    import torch

    found: dict[str, Any] = {
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": platform.machine(),
        "cpus": os.cpu_count(),
    }
    if torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name()
        found["memory_gb"] = round(torch.cuda.get_device_properties(0).total_memory / 1e9, 1)
        found["cuda"] = torch.version.cuda
    else:
        found["device"] = "CPU"
    names = ("torch", "diffusers", "transformers", "peft", "accelerate")
    return {**found, "python": platform.python_version(), **{name: _version(name) for name in names}}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def environment() -> dict[str, str]:
    """Of sections: they find this checkout, are offline, and wait as the command line does."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}


def read_rows(path: Path) -> list[Row]:
    """What a section has measured so far."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [Row(**json.loads(line)) for line in lines]


def run_section(name: str, seconds: float, tiny: bool) -> Iterator[list[Row]]:
    """A section in a process of its own: all its rows, whenever there are more, and at the end what went wrong."""
    with tempfile.TemporaryDirectory(prefix="liftkit-gpu-") as scratch:
        rows, output = Path(scratch) / "rows", Path(scratch) / "output"
        command = [sys.executable, __file__, "--section", name, "--rows", str(rows), "--seconds", f"{seconds:.0f}"]
        with output.open("wb") as file:
            more = ["--tiny"] if tiny else []
            process = subprocess.Popen(
                [*command, *more], env=environment(), cwd=ROOT, stdout=file, stderr=file, start_new_session=True
            )
            end, seen = time.monotonic() + seconds, 0
            try:
                while process.poll() is None and time.monotonic() < end:
                    time.sleep(0.2)
                    found = read_rows(rows)
                    if len(found) > seen:
                        seen = len(found)
                        yield found
            finally:
                late = process.poll() is None
                if late:
                    # With all that it started: its session is its own.
                    os.killpg(process.pid, 9)
                process.wait()
        found = read_rows(rows)
        if late:
            found.append(Row(name, "the rest", note=f"not done within {seconds:.0f} s"))
        elif process.returncode:
            said = output.read_text(errors="replace").strip().splitlines() or ["no output"]
            found.append(Row(name, "the rest", note=f"exit code {process.returncode}: {said[-1][:200]}"))
        yield found


def measure(names: list[str], seconds: float, tiny: bool, target: Path | None) -> list[Row]:
    """All sections; what each measures is written at once. A section may also take what earlier ones left of their time."""
    begun = time.monotonic()
    rows: list[Row] = []
    share = seconds / sum(BUDGETS[name] for name in names)
    record: dict[str, Any] = {"format": "liftkit.benchmark.gpu", "version": 1, "tiny": tiny, "machine": machine()}
    for place, name in enumerate(names):
        kept = share * sum(BUDGETS[later] for later in names[place + 1 :])
        allowed = seconds - kept - (time.monotonic() - begun)
        print(f"{name}: at most {allowed:.0f} s", file=sys.stderr, flush=True)
        before = rows
        for found in run_section(name, allowed, tiny):
            rows = [*before, *found]
            record |= {"seconds": round(time.monotonic() - begun, 1), "rows": [asdict(row) for row in rows]}
            if target is not None:
                target.write_text(json.dumps(record, indent=2) + "\n")
    print(f"\n{json.dumps(record['machine'])}\n{record['seconds']:.0f} s in all\n\n{table(rows)}")
    return rows


def play(section: str, target: Path, seconds: float, tiny: bool) -> None:
    """In the process of a section: add every row to a file as soon as it is there."""
    import _gpu_sections as sections
    from _gpu_model import TINY, Scale

    def add(row: Row) -> None:
        with target.open("a") as file:
            file.write(json.dumps(asdict(row)) + "\n")

    sections.run(section, TINY if tiny else Scale(), seconds, add)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("gpu.json"), help="where results go (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=list(BUDGETS), default=list(BUDGETS), help="some sections")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all sections together (%(default)s)")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, on a CPU too")
    parser.add_argument("--section", choices=list(BUDGETS), help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.section:
        play(chosen.section, chosen.rows, chosen.seconds, chosen.tiny)
        return
    import torch

    if not torch.cuda.is_available() and not chosen.tiny:
        print("gpu: there is no CUDA device here, so nothing was measured; --tiny runs it all with tiny shapes")
        return
    measure(chosen.only, chosen.seconds, chosen.tiny, chosen.json)


if __name__ == "__main__":
    main()
