"""Problems of a recipe, each with its place: ``file:line:column: message``, the line, and a caret under the spot."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from yaml.nodes import Node, ScalarNode

WIDTH = 110
"""Columns that a shown line may take; of longer ones the part about the spot is shown."""


@dataclass(frozen=True)
class Source:
    """Text that a recipe was read from.

    Args:
        name: a path, or ``override``.
        text: all of it.
        short: whether it is one line, so that its number says nothing.
    """

    name: str
    text: str
    short: bool = False


@dataclass(frozen=True, order=True)
class Problem:
    """Something wrong.

    Args:
        source: place of its source among the sources.
        line, column: from 0.
        message: what is wrong.
        width: characters that the caret underlines.
    """

    source: int
    line: int
    column: int
    message: str
    width: int = 1


def report(name: str, sources: Sequence[Source], problems: Iterable[Problem]) -> str:
    """All problems, in the order of the text."""
    found = sorted(set(problems))
    head = f"{name}: {len(found)} problem{'s' if len(found) > 1 else ''}"
    return "\n".join([head, *(_show(sources[problem.source], problem) for problem in found)])


def _show(source: Source, problem: Problem) -> str:
    place = "" if source.short else f"{problem.line + 1}:"
    head = f"{source.name}:{place}{problem.column + 1}: {problem.message}"
    lines = source.text.splitlines()
    line = lines[problem.line] if problem.line < len(lines) else ""
    begin = max(0, problem.column - WIDTH // 2) if len(line) > WIDTH else 0
    shown = line[begin : begin + WIDTH]
    before = shown[: problem.column - begin]
    # A tab stays a tab, and characters that take two columns count for two.
    pad = "".join("\t" if character == "\t" else " " * cell_len(character) for character in before)
    under = shown[len(before) : len(before) + problem.width]
    lead, tail = "… " if begin else "  ", " …" if len(line) > begin + WIDTH else ""
    return f"{head}\n{lead}{shown}{tail}\n  {pad}{'^' * max(1, cell_len(under))}"


def spot(node: Node) -> tuple[int, int, int]:
    """Line, column and width of a node; of one that goes on for lines or pages, its beginning."""
    begin, end = node.start_mark, node.end_mark
    one_line = isinstance(node, ScalarNode) and begin.line == end.line
    return begin.line, begin.column, max(1, end.column - begin.column) if one_line else 1
