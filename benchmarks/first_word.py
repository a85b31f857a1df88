"""How soon each command says its first word: python -m benchmarks first_word [--rounds 5] [--busy 2]

Seconds from the start of the process to the first byte on stdout or stderr; the process is ended there. The goal is half a
second for each command. ``--busy`` keeps so many processors busy meanwhile. Seconds of processor time are given beside: they
say what the wait would be on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _table import Row, add_option, finish

GOAL = 0.5
COMMANDS = {
    "--help": [],
    "--version": [],
    "clean": ["run"],
    "compare": ["base", "pixel"],
    "convert": ["model", "-o", "out"],
    "demo": ["-o", "out"],
    "doctor": [],
    "export": ["adapter", "-o", "out", "--format", "asymflow-adapter"],
    "finetune": ["recipe.yaml"],
    "fit": ["model", "-o", "lift.safetensors"],
    "generate": ["model", "--prompts", "demo", "-o", "out"],
    "import": ["adapter", "-o", "out"],
    "init": ["-o", "out", "--architecture", "jit", "--classes", "photos"],
    "models": [],
    "recipes copy": ["recipe"],
    "recipes list": [],
    "recipes show": ["recipe"],
    "report": ["model"],
    "sample": ["model", "-p", "a seven"],
    "try": ["model"],
    "verify": ["model"],
}
"""What each command is called with; nothing more than :func:`lay_out` makes is looked for before the first word."""


def lay_out(folder: Path) -> None:
    """An empty folder for each thing that a command names, for one that names nothing is refused before its first word."""
    for word in {word for words in COMMANDS.values() for word in words if not word.startswith("-")}:
        (folder / word).mkdir()


def first_word(name: str) -> tuple[float, float]:
    """Seconds to the first byte that a command prints, and of the processor about then."""
    with tempfile.TemporaryDirectory() as folder:
        lay_out(Path(folder))
        start = time.perf_counter()
        command = [sys.executable, "-m", "liftkit", *name.split(), *COMMANDS[name]]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=folder)
        assert process.stdout is not None
        assert process.stderr is not None
        select.select([process.stdout, process.stderr], [], [])
        took = time.perf_counter() - start
        process.kill()
        used = os.wait4(process.pid, 0)[2]
        process.stdout.close()
        process.stderr.close()
    return took, used.ru_utime + used.ru_stime


def measure(rounds: int) -> dict[str, tuple[float, float]]:
    """The medians of each command, in turns."""
    for name in COMMANDS:
        first_word(name)
    found = [{name: first_word(name) for name in COMMANDS} for _ in range(rounds)]
    return {
        name: (statistics.median(each[name][0] for each in found), statistics.median(each[name][1] for each in found))
        for name in COMMANDS
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Seconds to the first word of every command.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--busy", type=int, default=0, help="processes that compute meanwhile")
    add_option(parser)
    chosen = parser.parse_args()
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(chosen.busy)]
    try:
        found = measure(chosen.rounds)
    finally:
        for each in busy:
            each.kill()
    for name, (seconds, used) in found.items():
        print(f"{name:14s} {seconds:.3f} s, {used:.3f} s of the processor")
    beside = f"; beside {chosen.busy} busy processes" if chosen.busy else ""
    slowest = max(found, key=lambda name: found[name])
    seconds, used = found[slowest]
    note = f"the slowest, {slowest}: {used:.2f} s of the processor; the quickest {min(found.values())[0]:.2f} s{beside}"
    row = Row(f"first word of {len(found)} commands", None, seconds, "s", seconds, GOAL, note=note)
    finish([row], chosen.rows)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    os.environ.pop("RANK", None)
    main()
