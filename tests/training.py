"""Runs of a few small steps for tests: overrides of the shipped recipe ``tiny-klein``, in the current directory."""

from __future__ import annotations

import json
from typing import Any

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
