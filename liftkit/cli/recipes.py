"""``liftkit recipes``: what is shipped, to look at and to start from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from liftkit.cli import console
from liftkit.cli.completion import complete_recipe
from liftkit.cli.options import Command

recipes = typer.Typer(
    name="recipes",
    help="List, show and copy the recipes of liftkit finetune.\n\nExample: liftkit recipes copy tiny-klein mine.yaml",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Name = Annotated[
    str,
    typer.Argument(
        metavar="NAME", help="Name of a shipped recipe; liftkit recipes list has them.", autocompletion=complete_recipe
    ),
]


@recipes.command("list", cls=Command)
def list_() -> None:
    """Name the shipped recipes.

    Example: liftkit recipes list
    """
    from liftkit.finetune.shipped import shipped_recipes, summary

    found = [{"name": name, "summary": summary(path), "path": path} for name, path in shipped_recipes().items()]
    console.result(recipes=found)
    console.table("Recipes", [(str(each["name"]), str(each["summary"])) for each in found])


@recipes.command(cls=Command)
def show(name: Name) -> None:
    """Print a recipe.

    Example: liftkit recipes show tiny-klein
    """
    from liftkit.finetune.shipped import shipped_recipe

    path = shipped_recipe(name)
    text = path.read_text(encoding="utf-8")
    console.result(name=path.stem, path=path, text=text)
    console.out.print(text, end="")


@recipes.command(cls=Command)
def copy(
    name: Name,
    path: Annotated[
        Path | None,
        typer.Argument(metavar="FILE", help="File to write, or a folder for it.", show_default="NAME.yaml here"),
    ] = None,
) -> None:
    """Copy a recipe, to change it.

    Example: liftkit recipes copy flux2-klein-9b mine.yaml
    """
    from liftkit.checkpoint.files import check_file, write_text
    from liftkit.errors import UsageError
    from liftkit.finetune.shipped import shipped_recipe

    source = shipped_recipe(name)
    target = path / source.name if path is not None and path.is_dir() else path or Path(source.name)
    check_file(target, ".yaml")
    if target.exists():
        raise UsageError(f"{target}: exists already; give another name, or remove it first")
    write_text(target, source.read_text(encoding="utf-8"))
    console.result(name=source.stem, path=target)
    console.out.print(f"{target}: edit it, then liftkit finetune {target}")
