"""Settings with which a run fits into a memory: each is tried beside those before, until the sum fits."""

from __future__ import annotations

from typing import Any

from liftkit.finetune.estimates import Estimate
from liftkit.finetune.needs import Needs, Rows
from liftkit.finetune.recipe import Recipe
from liftkit.progress import Observer
from liftkit.progress import size as _bytes

Keys = dict[str, Any]

CHANGES: tuple[tuple[Keys, Keys], ...] = (
    ({"gradient_checkpointing": True}, {}),
    ({"micro_batch": 1}, {}),
    ({"base.quantize": "int8"}, {"base.quantize": "none"}),
    ({"optimizer.name": "adamw8bit"}, {"optimizer.name": "adamw"}),
    ({"base.quantize": "nf4"}, {}),
    ({"base.quantize": "none", "base.offload": "blocks", "compile": False}, {"base.offload": "none"}),
)
"""Keys to set, and those that must be so before: first what changes nothing but speed, then how exact the frozen weights and the
optimizer are, then what is slow."""


def propose(needs: Needs, budget: int, observer: Observer) -> Rows:
    """Rows of what was tried, with what each takes; the last one has the overrides to give, or says by how much nothing fits."""
    search = _Search(needs, observer)
    keys: Keys = {}
    if not search.estimate(keys).complete:
        return [("set", f"unknown: how much {needs.sketch.spec.name} takes cannot be estimated")]
    takes = least = search.takes(keys)
    rows: Rows = [("the recipe", search.text(keys))]
    for change, before in CHANGES:
        if takes <= budget:
            break
        changed = {**keys, **change}
        if not search.new(change, keys) or search.new(before, keys) or search.recipe(changed) is None:
            continue
        keys, takes = changed, search.takes(changed)
        least = min(least, takes)
        rows.append((f"and {_written(search.new(change))}", search.text(keys)))
    if takes > budget:
        return [
            *rows,
            ("set", f"nothing fits {_bytes(budget)}: {_bytes(least - budget)} too much with the least of these"),
        ]
    if keys.get("micro_batch") == 1:
        keys = search.larger(keys, budget)
    found = search.new(keys)
    if not found:
        return [*rows, ("set", f"nothing: the recipe fits {_bytes(budget)} as it is")]
    return [*rows, ("set", f"{_written(found)} (about {search.text(keys)})")]


def _written(keys: Keys) -> str:
    return " ".join(f"{key}={str(value).lower()}" for key, value in keys.items())


class _Search:
    """Estimates of recipes that differ in some keys from one; each is made once."""

    def __init__(self, needs: Needs, observer: Observer) -> None:
        self.needs, self.value, self.observer = needs, needs.recipe.value, observer
        self.found: dict[str, Estimate] = {}

    def new(self, wanted: Keys, keys: Keys | None = None) -> Keys:
        """Those of them that the recipe, with these keys, has not so."""
        now = {key: (keys or {}).get(key, self.value(key)) for key in wanted}
        if "micro_batch" in now:
            now["micro_batch"] = now["micro_batch"] or self.value("batch_size")
        return {key: value for key, value in wanted.items() if now[key] != value}

    def recipe(self, keys: Keys) -> Recipe | None:
        """The recipe with other values; None where they do not go together."""
        values = self.needs.recipe.model_dump(mode="json")
        for key, value in keys.items():
            *above, last = key.split(".")
            section = values
            for name in above:
                section = section[name]
            section[last] = value
        try:
            return Recipe.model_validate(values)
        except ValueError:
            return None

    def estimate(self, keys: Keys) -> Estimate:
        """What a recipe with these keys takes."""
        name = _written(self.new(keys))
        if name not in self.found:
            self.observer.status(f"estimate {name or 'the recipe'}")
            recipe = self.recipe(keys)
            assert recipe is not None
            self.found[name] = self.needs.estimate(recipe)
        return self.found[name]

    def takes(self, keys: Keys) -> int:
        """Bytes of the device."""
        return self.needs.total(self.estimate(keys))

    def text(self, keys: Keys) -> str:
        """Bytes of the device and, where it is another, of the host."""
        found = self.estimate(keys)
        host = f", and {_bytes(found.host)} of host memory" if self.needs.on_gpu and found.host else ""
        return f"{_bytes(self.needs.total(found))}{host}"

    def larger(self, keys: Keys, budget: int) -> Keys:
        """With the largest micro batch that fits, where one image does."""
        batch, before = self.value("batch_size"), self.value("micro_batch") or self.value("batch_size")
        sizes = [size for size in range(2, before + 1) if batch % size == 0]
        if not sizes:
            return keys
        one = self.takes(keys)
        slope = (self.takes({**keys, "micro_batch": sizes[0]}) - one) / (sizes[0] - 1)
        for size in reversed([size for size in sizes if one + slope * (size - 1) <= budget]):
            larger = {**keys, "micro_batch": size}
            if self.takes(larger) <= budget:
                return larger
        return keys
