"""One table of all that has a goal, or one benchmark with its options: python -m benchmarks [NAME [OPTIONS]]

Each runs in a process of its own. The table, with hardware, versions and commit, goes to ``benchmarks/results/cpu.json``. Threads
wait for each other as they do under the command line, which has to be said before torch is loaded.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from liftkit.cli.app import set_waiting

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from _table import Row, machine, read, save, table  # noqa: E402

QUICK = {
    "first_word": ["--rounds", "5"],
    "convert": ["--size", "1GB", "--rounds", "5", "--busy", "1", "--brief"],
    "fit": ["--images", "128", "--rounds", "4"],
    "finetune": ["--rounds", "8"],
    "sampling": ["--rounds", "40"],
}
"""What `make bench` measures, in sizes that take about six minutes on two cores."""
PATIENCE = 600
"""Seconds after which a benchmark is ended; the others go on."""
RESULTS = HERE / "results" / "cpu.json"


def measure() -> int:
    """Run all, print the table and write it, after each what there is so far; 1 if any could not be measured."""
    about, rows, failed = machine(), list[Row](), dict[str, str]()
    for name, options in QUICK.items():
        print(f"\n{name}", flush=True)
        found, problem = run(name, options)
        rows += found
        if problem:
            failed[name] = problem
        save(rows, {**about, "failed": failed}, RESULTS)
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    print(
        f"\n{about['processor']}, {about['processors']} processors, {about['memory'] / 1e9:.0f} GB, {about['system']}"
    )
    print(f"commit {about['commit']}, {about['date']}, load before {about['load']}; {versions}\n")
    print(table(rows))
    for name, problem in failed.items():
        print(f"not measured: {name}, {problem}")
    print(f"\n{RESULTS}")
    return 1 if failed else 0


def run(name: str, options: list[str]) -> tuple[list[Row], str]:
    """One benchmark in a process of its own: its rows, and why there are none."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "rows.json"
        command = [sys.executable, str(HERE / f"{name}.py"), *options, "--rows", str(file)]
        # A session of its own, to end with all that it started: some benchmarks keep processors busy.
        process = subprocess.Popen(command, start_new_session=True)
        try:
            code = process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            return [], f"which took more than {PATIENCE} seconds"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        rows = read(file) if file.exists() else []
    return rows, f"which ended with {code}" if code or not rows else ""


def main() -> int:
    set_waiting(os.environ)
    files = {file.stem: file for file in sorted(HERE.glob("[!_]*.py"))}
    if not sys.argv[1:]:
        return measure()
    name = sys.argv[1]
    if name not in files:
        sys.exit(f"{name!r} is no benchmark; there are {', '.join(files)}")
    return subprocess.run([sys.executable, files[name], *sys.argv[2:]], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
