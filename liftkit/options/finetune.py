"""Choices of a finetune that its recipe does not make."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from liftkit.errors import UsageError
from liftkit.options.option import Option

UNITS = {"MB": 10**6, "GB": 10**9, "MIB": 2**20, "GIB": 2**30}


def memory_size(text: str) -> int:
    """Bytes of a size such as ``24GB`` or ``80GiB``.

    Raises:
        UsageError: saying what is expected.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([MG]I?B)\s*", text.upper(), re.ASCII)
    if found is None or not float(found[1]):
        raise UsageError(f"--memory {text}: expected a size such as 24GB, 11.5GB or 80GiB")
    return int(float(found[1]) * UNITS[found[2]])


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions:
    """Choices of ``liftkit finetune``."""

    output: Annotated[
        Path | None,
        Option("Run folder; the same as output=FOLDER.", "FOLDER", ("--output", "-o"), default="the recipe's"),
    ] = None
    resume: Annotated[
        str | None,
        Option(
            "Run to continue: its folder, one of its checkpoints, or `latest` for the folder of -o.",
            "RUN",
            default="a new run",
        ),
    ] = None
    show_recipe: Annotated[bool, Option("Print the whole recipe with its defaults too; only with --dry-run.")] = False
    memory: Annotated[
        int | None,
        Option(
            "Memory of the device, such as 24GB: find settings that fit; only with --dry-run.",
            "SIZE",
            default="not looked at",
            parse=memory_size,
        ),
    ] = None
