"""One table of all that has a goal, or one benchmark with its options: python -m benchmarks [NAME [OPTIONS]]

Each runs in a process of its own. The table, with hardware, versions and commit, goes to ``benchmarks/results/cpu.json``. Threads
wait for each other as they do under the command line, which has to be said before torch is loaded.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from liftkit.cli.app import set_waiting

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from _table import Row, machine, read, save, table  # noqa: E402

QUICK = {
    "first_word": ["--rounds", "5"],
    "convert": ["--size", "1GB", "--rounds", "5", "--busy", "1", "--brief"],
    "finetune": ["--rounds", "8"],
    "fit": ["--images", "128", "--rounds", "4"],
}
"""What `make bench` measures, in sizes that take about six minutes on two cores."""
RESULTS = HERE / "results" / "cpu.json"


def measure() -> int:
    """Run all, print the table and write it; the exit code is that of the first that could not be measured, and 0 if all were."""
    about, rows, worst = machine(), list[Row](), 0
    with tempfile.TemporaryDirectory() as scratch:
        for name, options in QUICK.items():
            file = Path(scratch) / f"{name}.json"
            code = subprocess.run(
                [sys.executable, str(HERE / f"{name}.py"), *options, "--rows", str(file)], check=False
            ).returncode
            rows += read(file) if file.exists() else []
            worst = worst or code
    save(rows, about, RESULTS)
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    print(
        f"\n{about['processor']}, {about['processors']} processors, {about['memory'] / 1e9:.0f} GB, {about['system']}"
    )
    print(f"commit {about['commit']}, {about['date']}, load before {about['load']}; {versions}\n")
    print(table(rows))
    print(f"\n{RESULTS.relative_to(HERE.parent)}")
    return worst


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
