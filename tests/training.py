"""Runs of a few small steps for tests: by a recipe of their own, or by overrides of the shipped ``tiny-klein``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from liftkit.progress import Silent

FEW: dict[str, Any] = {
    "model": "pixel",
    "data.sources": [{"kind": "folder", "path": "photos"}],
    "data.workers": 0,
    "steps": 2,
    "batch_size": 2,
    "precision": "no",
    "threads": 1,
    "trainable.head": None,
    "optimizer.warmup": 0,
    "ema.start": 1,
    "checkpoints.every": 1,
    "previews.every": 0,
    "validation.every": 0,
    "trackers": [],
}


def few_steps(output: str, **changes: Any) -> list[str]:
    """Overrides for a run of two steps on ``photos``, by the model ``pixel``; ``__`` in a name stands for a dot."""
    chosen = FEW | {"output": output} | {key.replace("__", "."): value for key, value in changes.items()}
    return [f"{key}={json.dumps(value)}" for key, value in chosen.items()]


class Watch(Silent):
    """Calls a function after each step; keeps what it is told."""

    def __init__(self, after: Any = lambda step: None) -> None:
        self.after, self.steps = after, 0
        self.notes: list[str] = []
        self.text = ""

    def note(self, text: str) -> None:
        self.notes.append(text)

    def status(self, text: str) -> None:
        self.steps, self.text = self.steps + 1, text
        self.after(self.steps)


def rows(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in found]


TEXT = """
model: {model}
output: {output}
data:
  sources: [{{kind: demo, count: 24}}]
  cache: {cache}
  workers: 1
steps: 6
batch_size: 4
precision: "no"
threads: {threads}
trainable: {{rank: 4, dropout: 0.1}}
optimizer: {{name: muon, learning_rate: 2e-3, warmup: 2, multipliers: {{proj_out: 3}}}}
noise: {{shift: 1.0}}
objective: {{adversarial: 0.1}}
ema: {{start: 1}}
checkpoints: {{every: 3}}
previews: {{every: 3, count: 2, steps: 2}}
validation: {{every: 3, images: 4, quantiles: 2}}
"""
