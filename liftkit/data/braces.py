"""Braces in the names of shards, as a shell expands them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice

from liftkit.errors import UsageError

MOST_NAMES = 100_000
DEEPEST = 16


def expand_braces(pattern: str) -> list[str]:
    """``a{0..2}`` and ``a{x,y}`` in full.

    Raises:
        UsageError: if there are too many names.
    """
    found = list(islice(_expanded(pattern, pattern, 0), MOST_NAMES + 1))
    if len(found) > MOST_NAMES:
        raise UsageError(f"{pattern}: its braces make more than {MOST_NAMES:,} names")
    return found


def _expanded(pattern: str, whole: str, depth: int) -> Iterator[str]:
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        yield pattern
        return
    if depth == DEEPEST:
        raise UsageError(f"{whole}: more than {DEEPEST} braces")
    for value in _values(match[1]):
        yield from _expanded(pattern[: match.start()] + value + pattern[match.end() :], whole, depth + 1)


def _values(inside: str) -> Iterator[str]:
    numbers = re.fullmatch(r"(\d{1,18})\.\.(\d{1,18})", inside)
    if numbers is None:
        yield from inside.split(",")
        return
    for number in range(int(numbers[1]), int(numbers[2]) + 1):
        yield f"{number:0{len(numbers[1])}}"
