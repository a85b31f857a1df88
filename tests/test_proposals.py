"""Settings with which a run fits into a memory."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from liftkit.errors import UsageError
from liftkit.finetune.estimates import Estimate
from liftkit.finetune.proposals import propose
from liftkit.finetune.recipe import Recipe
from liftkit.options.finetune import memory_size
from liftkit.progress import Silent
from tests.recipes import SMALL, load

GB = 10**9
SOURCES = {"sources": [{"kind": "demo"}]}
CHECKPOINTED, ONE, INT8 = "gradient_checkpointing=true", "micro_batch=1", "base.quantize=int8"


class Formula:
    """Needs of a run that follow from its settings by a formula."""

    on_gpu = True
    sketch = SimpleNamespace(spec=SimpleNamespace(name="Network"))

    def __init__(self, complete: bool = True, **recipe: Any) -> None:
        self.recipe = Recipe.model_validate(
            {"model": "x", "output": "y", "data": SOURCES, "batch_size": 8, "trackers": [], **recipe}
        )
        self.complete = complete

    def estimate(self, recipe: Recipe) -> Estimate:
        weights = {"none": 16, "int8": 8, "nf4": 4}[recipe.base.quantize] if recipe.base.offload == "none" else 2
        row = 1 if recipe.gradient_checkpointing else 4
        optimizer = 1 if recipe.optimizer.name == "adamw8bit" else 3
        parts = {
            "weights": weights,
            "activations": row * (recipe.micro_batch or recipe.batch_size),
            "optimizer": optimizer,
        }
        host = 16 * GB if recipe.base.offload == "blocks" else 0
        return Estimate({name: each * GB for name, each in parts.items()}, host, 0.0, self.complete)

    def total(self, found: Estimate) -> int:
        return found.total


def answer(budget: int, **recipe: Any) -> str:
    return propose(Formula(**recipe), budget * GB, Silent())[-1][1]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (60, "nothing: the recipe fits 60.00 GB as it is"),
        (27, f"{CHECKPOINTED} (about 27.00 GB)"),
        # Four rows at once fit, eight do not.
        (24, f"{CHECKPOINTED} micro_batch=4 (about 23.00 GB)"),
        (16, f"{CHECKPOINTED} micro_batch=4 {INT8} (about 15.00 GB)"),
        (10, f"{CHECKPOINTED} {ONE} {INT8} optimizer.name=adamw8bit (about 10.00 GB)"),
        (7, f"{CHECKPOINTED} micro_batch=2 base.quantize=nf4 optimizer.name=adamw8bit (about 7.00 GB)"),
        (
            4,
            f"{CHECKPOINTED} {ONE} optimizer.name=adamw8bit base.offload=blocks (about 4.00 GB, and 16.00 GB of host memory)",
        ),
        (3, "nothing fits 3.00 GB: 1.00 GB too much with the least of these"),
    ],
)
def test_what_changes_least_comes_first(budget: int, expected: str) -> None:
    assert answer(budget) == expected


def test_what_it_says_is_what_one_can_paste(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = answer(10).partition(" (")[0].split()
    assert Formula().estimate(load(SMALL, "batch_size=8", *found)).total == 10 * GB


def test_settings_that_do_not_go_together_are_passed_over() -> None:
    full = answer(20, trainable={"mode": "full"})
    assert full == f"{CHECKPOINTED} {ONE} (about 20.00 GB)"
    assert "quantize" not in answer(4, trainable={"mode": "full"})
    assert "optimizer" not in answer(4, optimizer={"name": "muon"})
    compiled = answer(4, compile=True, base={"quantize": "int8"})
    assert "base.quantize=none base.offload=blocks compile=false" in compiled
    assert answer(8, batch_size=1).startswith("gradient_checkpointing=true base.quantize=nf4")


def test_where_nothing_is_known_nothing_is_proposed() -> None:
    assert answer(24, complete=False) == "unknown: how much Network takes cannot be estimated"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("24GB", 24 * GB), (" 11.5 gb", 11_500_000_000), ("80GiB", 80 * 2**30), ("512MB", 512 * 10**6)],
)
def test_sizes(text: str, expected: int) -> None:
    assert memory_size(text) == expected


@pytest.mark.parametrize("text", ["", "24", "GB", "0GB", "-1GB", "1e3GB", "24TB", "٢GB", "24 GB GB"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="expected a size such as 24GB"):
        memory_size(text)
