"""The reference of the command line in docs/cli.md, made from the commands themselves: ``python -m tools.cli_reference``."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from liftkit.cli.answers import ALWAYS, KEYS
from liftkit.cli.app import app

PAGE = Path(__file__).parents[1] / "docs" / "cli.md"
MARK = "<!-- From here on made by python -m tools.cli_reference -->\n"
EXAMPLE = "Example: "
WIDTH, COLUMN = 110, 30


def commands() -> Iterator[tuple[Any, Any]]:
    """Every command that can be run, with the context that it is called in, in the order of the help."""
    root = typer.main.get_command(app)
    yield from _below(root, _context(root, "liftkit", None))


def reference() -> str:
    """All commands: what each is for, how it is called, its arguments and options, an example, and its JSON."""
    root = typer.main.get_command(app)
    parts = ["## liftkit\n", _text(_context(root, "liftkit", None), root)]
    parts += ["Every command's object has the keys\n", *_keys(ALWAYS)]
    for command, context in commands():
        name = context.command_path
        parts += [f"## {name}\n", f"{about(command)}\n", _text(context, command)]
        parts += ["Example:\n", f"```sh\n{example(command)}\n```\n"]
        parts += ["Keys of the JSON object:\n", *_keys(KEYS[name.removeprefix("liftkit ")])]
    return "\n".join(parts)


def write() -> None:
    """Bring the page up to date."""
    PAGE.write_text(PAGE.read_text().partition(MARK)[0] + MARK + "\n" + reference())


def about(command: Any) -> str:
    """What a command's help says before its example."""
    return command.help.partition(EXAMPLE)[0].strip()


def example(command: Any) -> str:
    """The line of the example in a command's help; empty if there is none."""
    return command.help.partition(EXAMPLE)[2].partition("\n")[0].strip()


def _below(group: Any, context: Any) -> Iterator[tuple[Any, Any]]:
    for name, command in group.commands.items():
        inner = _context(command, name, context)
        if hasattr(command, "commands"):
            yield from _below(command, inner)
        else:
            yield command, inner


def _context(command: Any, name: str, parent: Any) -> Any:
    """typer's own; its module is another one in other versions."""
    return command.context_class(command, info_name=name, parent=parent, **command.context_settings)


def _text(context: Any, command: Any) -> str:
    """Synopsis, arguments and options, as a man page has them."""
    lines = [context.get_usage().removeprefix("Usage: "), ""]
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None:
            lines += _entry(*record)
    return "\n".join(["```text", *lines, "```\n"])


def _entry(name: str, meaning: str) -> list[str]:
    """One argument or option, its meaning beside it, or below it where the name is long."""
    folded = textwrap.wrap(" ".join(meaning.split()), WIDTH - COLUMN)
    head = [] if len(name) < COLUMN - 1 else [name]
    if not head:
        head = [f"{name:{COLUMN}}{folded.pop(0) if folded else ''}".rstrip()]
    return [*head, *(" " * COLUMN + line for line in folded)]


def _keys(keys: dict[str, str]) -> list[str]:
    return ["| key | meaning |\n|---|---|", *(f"| `{key}` | {meaning} |" for key, meaning in keys.items()), ""]


if __name__ == "__main__":
    write()
