"""The numeric tests as other machines would run them: ``python -m tests.cpus [--quick]``

A machine's CPU decides which kernels torch, MKL and oneDNN take; so do the number of threads and where weights lie in memory.
Each setting below forces some of these choices in a process of its own, so that one machine stands in for others. All
settings are all combinations; the quick ones have each choice once at least.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path

ROOT = Path(__file__).parents[1]
NUMERIC = (
    "models",
    "core",
    "precision",
    "objective",
    "fit",
    "fits",
    "guidance",
    "adapter",
    "lora",
    "evaluate",
    "pipelines",
)
"""Test files that compute, by name; those of whole programs run once, in the suite."""
ONE = "tests/test_going_on.py::test_a_run_killed_and_resumed_equals_one_that_was_not"
WITHOUT = "process or importing or loading_fails or of_the_model_itself"
"""What is about processes and imports, or takes long, and computes nothing that other tests do not."""
KERNELS: dict[str, dict[str, str]] = {
    "native": {},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "default": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
}


@dataclass(frozen=True)
class Setting:
    """One way to run the tests.

    Args:
        kernels: of torch and oneDNN: a key of :data:`KERNELS`.
        compatible: whether MKL takes the branch that all CPUs have, whatever the alignment.
        threads: of a process; 0 is all.
        misaligned: whether weights are moved; see :mod:`tests.alignment`.
    """

    kernels: str
    compatible: bool
    threads: int
    misaligned: bool

    def __str__(self) -> str:
        parts = [f"kernels {self.kernels}", "MKL compatible" if self.compatible else "MKL's choice"]
        parts += ["1 thread" if self.threads else "all threads", "misaligned" if self.misaligned else "aligned"]
        return ", ".join(parts)

    def environment(self) -> dict[str, str]:
        """Variables of its process."""
        mkl = {"MKL_CBWR": "COMPATIBLE"} if self.compatible else {}
        return {**os.environ, **KERNELS[self.kernels], **mkl, "OMP_WAIT_POLICY": "PASSIVE"}

    def command(self) -> list[str]:
        """Its tests."""
        files = [f"tests/test_{name}.py" for name in NUMERIC]
        more = [f"--threads={self.threads}", *(["--misaligned"] if self.misaligned else [])]
        chosen = ["-m", "not slow", "-k", f"not ({WITHOUT})", "-p", "no:cacheprovider", "--tb=short"]
        return [sys.executable, "-m", "pytest", *chosen, *more, *files, ONE]


EVERY = [Setting(*choice) for choice in product(KERNELS, (False, True), (1, 0), (False, True))]
QUICK = [Setting("avx2", False, 0, True), Setting("default", True, 1, True), Setting("native", True, 0, False)]


def run(setting: Setting) -> bool:
    """Run the tests under a setting and show how they ended, in one line where all passed."""
    begun = time.monotonic()
    done = subprocess.run(
        setting.command(), env=setting.environment(), cwd=ROOT, capture_output=True, text=True, check=False
    )
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    result = "passed" if done.returncode == 0 else f"{len(failed)} failed (exit code {done.returncode})"
    print(f"{setting!s:58s} {result}, {time.monotonic() - begun:.0f} s", flush=True)
    if done.returncode:
        print(*(f"  {name}" for name in failed), done.stdout[-8000:], done.stderr[-2000:], sep="\n", flush=True)
    return done.returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"{len(QUICK)} settings instead of {len(EVERY)}")
    settings = QUICK if parser.parse_args().quick else EVERY
    with ThreadPoolExecutor(max(1, min(4, (os.cpu_count() or 1)))) as pool:
        passed = list(pool.map(run, settings))
    sys.exit(0 if all(passed) else 1)


if __name__ == "__main__":
    main()
