"""Pages from the templates of this package: whatever is put into one is text, unless a function of ours made it as markup."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from liftkit.checkpoint.text import printable
from liftkit.report.glossary import formula, symbols


@cache
def environment() -> Environment:
    """Templates with autoescaping; a name that is missing is an error, and control characters become their escapes."""
    folder = FileSystemLoader(Path(__file__).parent / "templates")
    made = Environment(
        loader=folder,
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_finalized,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["symbols"] = lambda text: symbols(printable(text))
    made.filters["formula"] = formula
    return made


def render(template: str, **values: Any) -> str:
    """A page.

    Args:
        template: its file.
        values: what it shows.
    """
    return environment().get_template(template).render(**values)


def _finalized(value: Any) -> Any:
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value
