"""What the shell may complete beyond names, options and their choices."""

from __future__ import annotations


def complete_recipe(incomplete: str) -> list[tuple[str, str]]:
    """Shipped recipes that begin so, each with what it is for."""
    from liftkit.finetune.shipped import shipped_recipes, summary

    return [(name, summary(path)) for name, path in shipped_recipes().items() if name.startswith(incomplete)]
