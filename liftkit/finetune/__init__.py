"""Finetuning: the objective (Sec. 5.2 of the paper), recipes and the trainer.

It imports from formats and below; demo and cli import it. Read ``objective.py`` first, then ``step.py``,
``learner.py`` and ``trainer.py``.
"""

from __future__ import annotations

from typing import Any

_PUBLIC = {
    "asymflow_loss": "liftkit.finetune.objective",
    "flow_loss": "liftkit.finetune.objective",
    "load_recipe": "liftkit.finetune.recipe_file",
    "finetune": "liftkit.finetune.run",
}


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        from importlib import import_module

        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
