"""Small recipes for tests, and what is said of them; all in the current directory."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from liftkit.errors import UsageError
from liftkit.finetune.recipe import Recipe
from liftkit.finetune.recipe_file import load_recipe
from liftkit.finetune.run import finetune

SMALL = "model: demo\noutput: run\ndata: {sources: [{kind: demo}]}\n"
SCHEMA = Recipe.model_json_schema()


def load(text: str, *overrides: str) -> Recipe:
    Path("recipe.yaml").write_bytes(text.encode())
    return load_recipe("recipe.yaml", overrides)


def losses(folder: Path) -> list[float]:
    """Of the steps of a run."""
    found = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [row["loss"] for row in found if "loss" in row]


def trained(recipe: Recipe) -> list[float]:
    """The losses of a run that this runs."""
    finetune(recipe)
    return losses(recipe.output)


def refused(text: str, *overrides: str) -> str:
    """The report on a recipe that will not do."""
    with pytest.raises(UsageError) as caught:
        load(text, *overrides)
    return str(caught.value)


def problems(text: str, *overrides: str) -> list[str]:
    """The lines of a report that tell a place and a problem."""
    return re.findall(r"^(?:recipe\.yaml:\d+:\d+|override:\d+): .*$", refused(text, *overrides), re.MULTILINE)


def keys(schema: dict[str, Any] = SCHEMA, above: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every dotted key outside lists, with its schema; sections as well."""
    for name, key in schema["properties"].items():
        yield above + name, key
        if "$ref" in key:
            yield from keys(SCHEMA["$defs"][key["$ref"].rpartition("/")[2]], f"{above}{name}.")


def written(path: str, value: str) -> str:
    """A recipe in which one key stands in the last line."""
    section, _, name = path.rpartition(".")
    required = {"model": "model: demo\n", "output": "output: run\n", "data": "data:\n  sources: [{kind: demo}]\n"}
    base = "".join(line for key, line in required.items() if key not in (path, section))
    if path == "data.sources":
        return f"{base}data:\n  sources: {value}\n"
    if section == "data":
        return f"{base}{required['data']}  {name}: {value}\n"
    return f"{base}{section}:\n  {name}: {value}\n" if section else f"{base}{name}: {value}\n"


PLAIN = ("previews.every=0", "validation.every=0", "objective.adversarial=0", "optimizer.name=adamw", "save=adapter")


def recipes_in(root: Path, model: Path) -> Callable[..., Recipe]:
    """Makes recipes of short runs of a model, ``(name, *overrides)``, which share a cache."""
    from tests.training import TEXT

    def recipe(name: str, *overrides: str) -> Recipe:
        file = root / f"{name}.yaml"
        file.write_text(TEXT.format(model=model, output=root / name, cache=root / "cache", threads=1))
        return load_recipe(file, [*PLAIN, *overrides])

    return recipe
