"""The recipes that come with liftkit: the top-level ``recipes/`` of a checkout, ``liftkit/recipes`` once installed."""

from __future__ import annotations

import difflib
from pathlib import Path

from liftkit.errors import UsageError


def shipped_recipes() -> dict[str, Path]:
    """The files by name, in order."""
    package = Path(__file__).parents[1]
    installed = package / "recipes"
    folder = installed if installed.is_dir() else package.parent / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def shipped_recipe(name: str) -> Path:
    """One of them, by name.

    Raises:
        UsageError: if there is none of that name.
    """
    recipes = shipped_recipes()
    if name not in recipes:
        near = difflib.get_close_matches(name.removesuffix(".yaml"), recipes, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(recipes)}"
        raise UsageError(f"{name}: no recipe of that name; {hint}")
    return recipes[name]


def summary(path: Path) -> str:
    """What a recipe is for: its first line, a comment."""
    return path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
