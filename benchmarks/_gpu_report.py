"""The sections of benchmarks/gpu.py, and the table of what they measured. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
BUDGETS = {
    "tests": 70,
    "sampling": 75,
    "finetune-1024": 65,
    "compiled-1024": 120,
    "finetune-512": 50,
    "compiled-512": 65,
    "memory": 70,
    "memory-9b": 110,
    "fit": 25,
    "convert": 45,
}
"""Sections in their order, with the seconds that each may take at most if those before it took all of theirs."""


@dataclass
class Row:
    """One line of the table; what does not apply is None.

    Args:
        section: that measured it.
        what: was measured.
        ms: milliseconds.
        images_per_second: throughput.
        peak_gb: most memory in use, of the device where it is a GPU, in GB (1e9 bytes).
        tflops: rate of the operations counted, in TFLOP/s.
        mfu: that as a share of the device's peak.
        ratio: to the floor.
        goal: in words, with its bound.
        met: whether it is.
        note: anything else, or what went wrong.
    """

    section: str
    what: str
    ms: float | None = None
    images_per_second: float | None = None
    peak_gb: float | None = None
    tflops: float | None = None
    mfu: float | None = None
    ratio: float | None = None
    goal: str = ""
    met: bool | None = None
    note: str = ""


Add = Callable[[Row], None]

COLUMNS: dict[str, tuple[str, Callable[[Row], str]]] = {
    "section": ("<", lambda row: row.section),
    "what": ("<", lambda row: row.what),
    "ms": (">", lambda row: _number(row.ms, ".1f")),
    "images/s": (">", lambda row: _number(row.images_per_second, ".2f")),
    "peak GB": (">", lambda row: _number(row.peak_gb, ".1f")),
    "TFLOP/s": (">", lambda row: _number(row.tflops, ".1f")),
    "MFU": (">", lambda row: _number(row.mfu, ".1%")),
    "ratio": (">", lambda row: _number(row.ratio, ".3f")),
    "goal": ("<", lambda row: f"{row.goal} {'met' if row.met else 'MISSED'}" if row.met is not None else row.goal),
    "note": ("<", lambda row: row.note),
}


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


@contextmanager
def recorded(section: str, what: str, add: Callable[[Row], None]) -> Iterator[None]:
    """The edge of the benchmark: whatever goes wrong becomes a row."""
    try:
        yield
    except Exception as error:
        add(Row(section, what, note=one_line(f"{type(error).__name__}: {error}")))


def one_line(text: str) -> str:
    return " ".join(text.split())[:200]


def table(rows: list[Row]) -> str:
    """The rows in Markdown, with columns of equal width."""
    cells = [[show(row).replace("|", "/") for _, show in COLUMNS.values()] for row in rows]
    widths = [max(len(name), *(len(line[at]) for line in cells), 3) for at, name in enumerate(COLUMNS)]
    sides = [side for side, _ in COLUMNS.values()]
    rule = ["-" * (width - 1) + (":" if side == ">" else "-") for width, side in zip(widths, sides)]
    lines = [list(COLUMNS), rule, *cells]
    return "\n".join(
        "| " + " | ".join(f"{cell:{side}{width}}" for cell, side, width in zip(line, sides, widths)) + " |"
        for line in lines
    )
