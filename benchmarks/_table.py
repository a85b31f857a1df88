"""What the benchmarks of `make bench` have in common: rows of one table, and a file of results with the machine's description."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = ("liftkit", "torch", "diffusers", "transformers", "accelerate", "safetensors", "blake3", "numpy")


@dataclass(frozen=True)
class Row:
    """A figure beside its floor.

    Args:
        what: was measured.
        floor: what nobody can go below, in ``unit``; None where the goal is absolute.
        ours: in ``unit``.
        ratio: that the goal is for, a median over rounds; of a goal without a floor, ``ours`` itself.
        goal: bound of the ratio.
        at_least: the goal is a lower bound.
        note: what else there is to say.
    """

    what: str
    floor: float | None
    ours: float
    unit: str
    ratio: float
    goal: float
    at_least: bool = False
    note: str = ""

    @property
    def met(self) -> bool:
        return self.ratio >= self.goal if self.at_least else self.ratio <= self.goal

    def cells(self) -> list[str]:
        floor, ratio = ("", "") if self.floor is None else (f"{self.floor:.3g} {self.unit}", f"{self.ratio:.3f}")
        goal = f"{'at least' if self.at_least else 'at most'} {self.goal:g}" + ("" if ratio else f" {self.unit}")
        return [
            self.what,
            floor,
            f"{self.ours:.3g} {self.unit}",
            ratio,
            goal,
            "met" if self.met else "MISSED",
            self.note,
        ]


HEAD = ["what", "floor", "ours", "ratio", "goal", "", "note"]


def table(rows: Iterable[Row]) -> str:
    """The rows in Markdown, columns aligned."""
    lines = [HEAD, *(row.cells() for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    drawn = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in lines]
    return "\n".join([drawn[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *drawn[1:]])


def machine() -> dict[str, Any]:
    """Hardware, versions, commit, and how busy the machine is already."""
    commit = _git("rev-parse", "--short", "HEAD") + ("-dirty" if _git("status", "--porcelain") else "")
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit,
        "processor": _processor(),
        "processors": os.cpu_count(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.machine()}",
        "load": [round(each, 2) for each in os.getloadavg()],
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    }


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, check=False, cwd=Path(__file__).parent
        )
    except OSError:
        return "unknown"
    return done.stdout.strip()


def _processor() -> str:
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def add_option(parser: argparse.ArgumentParser) -> None:
    """``--rows FILE``: where a benchmark leaves its rows for the table."""
    parser.add_argument("--rows", type=Path, default=None, help=argparse.SUPPRESS)


def finish(rows: list[Row], file: Path | None) -> None:
    """Print the rows of one benchmark, and leave them for the table of all."""
    print(table(rows))
    if file is not None:
        file.write_text(json.dumps([asdict(row) for row in rows]))


def read(file: Path) -> list[Row]:
    return [Row(**each) for each in json.loads(file.read_text())]


def save(rows: list[Row], about: dict[str, Any], file: Path) -> None:
    """The results as a file."""
    found = {**about, "rows": [{**asdict(row), "met": row.met} for row in rows]}
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(found, indent=1) + "\n")
