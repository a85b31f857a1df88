"""How a field of an options object appears on the command line, and the options that several commands have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

LAST_SEED = 2**62
"""Of image 0; the others count up from it."""
Auto = Literal["auto"]
Shards = Literal["copy", "link"]
Named = Literal["file", "folder", "path", "model"]
"""What an option's value names: a file, a folder, either, or a model or an adapter, which the Hub may have too."""


@dataclass(frozen=True)
class Option:
    """How a field of an options object appears on the command line.

    Args:
        help: a full sentence that stands alone.
        metavar: what kind of word follows the option; by the field's type if None.
        flags: the option's names, where the field's own is not the only one.
        min, max: bounds of a number, both allowed.
        default: what is taken where the option is left out, for people, where that is no constant.
        parse: text to value, where the type does not say it.
        names: what has to be there, so that a command that names nothing is refused before any library loads.
    """

    help: str
    metavar: str | None = None
    flags: tuple[str, ...] = ()
    min: float | None = None
    max: float | None = None
    default: str | None = None
    parse: Callable[[str], Any] | None = None
    names: Named | None = None


@dataclass(frozen=True)
class Argument(Option):
    """A field that is given by its place, without a name."""


Device = Annotated[
    str,
    Option("Device to compute on: `cpu`, `cuda`, `cuda:1` or `mps`; `auto` takes the fastest one there is.", "DEVICE"),
]
Overwrite = Annotated[bool, Option("Replace what an earlier run of this command wrote to the output folder.")]
ShardsOption = Annotated[
    Shards,
    Option("How weight files without a changed tensor reach the output: a `copy`, or a hard `link` to the same file."),
]
