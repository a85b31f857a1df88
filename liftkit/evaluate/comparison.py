"""A comparison as data: what is asked, the rows of its table, and what it found."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from torch import Tensor

from liftkit.checkpoint.record import versions
from liftkit.evaluate.figures import FIGURES, Score
from liftkit.evaluate.verdict import Verdict

SCHEMA = "liftkit.comparison/1"
Role = Literal["real", "control", "pixel"]


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Args:
        key: ``real``, ``vae``, ``base``, ``unsharp``, ``noise``, ``continued``, ``scratch``, or ``pixel-1`` and so on.
        label: for people.
        role: ``real`` is what a perfect model would score; ``control`` is to be beaten; ``pixel`` is what it is about.
        score: None for a control that was not given.
        images: the first ones, uint8 (8, 3, S, S) at most; None where there is no score.
        detail: where it came from, plain data.
    """

    key: str
    label: str
    role: Role
    score: Score | None = None
    images: Tensor | None = field(default=None, repr=False)
    detail: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """What a comparison found.

    Args:
        rows: of the table, in order.
        verdicts: one for each pixel model.
        prompts: of the images that are shown.
        count: samples of each row.
        real: the real images, plain data.
        notes: what a reader has to know.
        settings: the options as they were resolved, plain data.
        metrics: what the published figures are by name, plain data; why, where one is left out.
    """

    rows: list[Row]
    verdicts: list[Verdict]
    prompts: list[str]
    count: int
    real: dict[str, Any]
    notes: list[str]
    settings: dict[str, Any]
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)

    def best(self, name: str) -> set[str]:
        """Keys of the rows that are best in a figure, or level with the best, among those that a model painted."""
        figure, values = FIGURES[name], {}
        for row in self.rows:
            value = row.score.figures[name] if row.score is not None else None
            if value is not None and row.key not in ("real", "vae"):
                values[row.key] = figure.cost(value)
        limit = min(values.values(), default=0.0) + figure.tolerance(self.count)
        return {key for key, cost in values.items() if cost <= limit}

    def to_dict(self) -> dict[str, Any]:
        """Plain data in the schema of docs/compare.md."""
        return {
            "schema": SCHEMA,
            "count": self.count,
            "real": self.real,
            "rows": [
                {
                    "key": row.key,
                    "label": row.label,
                    "role": row.role,
                    "figures": row.score.figures if row.score else None,
                    "spectrum": row.score.spectrum if row.score else None,
                    "detail": row.detail,
                }
                for row in self.rows
            ],
            "verdicts": [asdict(verdict) for verdict in self.verdicts],
            "metrics": self.metrics,
            "notes": self.notes,
            "settings": self.settings,
            "versions": versions(),
        }
