"""Choices of reports."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from liftkit.options.option import Option

Html = Annotated[Path | None, Option("File for one page with pictures, which opens offline.", "FILE", default="none")]


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Choices of ``liftkit report``."""

    html: Html = None
    json: Annotated[
        Path | None, Option("File for the figures; docs/report.md has the schema.", "FILE", default="none")
    ] = None
    compare: Annotated[
        Path | None, Option("Another converted folder or lift to compare with.", "FOLDER", default="none", names="path")
    ] = None
