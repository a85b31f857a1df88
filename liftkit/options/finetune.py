"""Choices of a finetune that its recipe does not make."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from liftkit.options.option import Option


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
        str | None,
        Option(
            "Memory of the device, such as 24GB: find settings that fit; only with --dry-run.",
            "SIZE",
            default="not looked at",
        ),
    ] = None
