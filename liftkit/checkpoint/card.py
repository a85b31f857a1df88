"""What model cards (README.md) take from files of others: license fields and names, and nothing that a page would act on."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from liftkit.checkpoint.source import open_regular

LICENSE = ("license", "license_name", "license_link")
MAX_HEADER = 65536
"""Bytes of a card that are looked at: its front matter stands at the start."""
_FIELDS = {
    "license": re.compile(r"[\w.+ -]{1,100}", re.ASCII),
    "license_name": re.compile(r"[\w.+ -]{1,100}", re.ASCII),
    "license_link": re.compile(r"(?:https?://)?[\w.~/%#?=&+-]{1,300}", re.ASCII),
    "base_model": re.compile(r"[\w.-]{1,100}/[\w.-]{1,100}", re.ASCII),
}


def source_header(card: Path, fields: Sequence[str] = LICENSE) -> dict[str, str]:
    """Fields of the front matter of somebody's card, as far as they are plain text of their kind.

    Args:
        card: README.md; it may be missing.
        fields: which; of the license and ``base_model``.
    """
    import yaml

    if not card.is_file():
        return {}
    with open_regular(card) as file:
        text = (file.read(MAX_HEADER) or b"").decode("utf-8-sig", errors="replace").replace("\r\n", "\n")
    front = re.match(r"^---\n(.*?)\n---", text, re.DOTALL)
    try:
        # Text alone: a date or a number stays what it was written as.
        content = yaml.load(front[1], yaml.BaseLoader) if front else {}
    except (yaml.YAMLError, RecursionError):
        return {}
    found = content if isinstance(content, dict) else {}
    return {key: value for key in fields if isinstance(value := found.get(key), str) and _FIELDS[key].fullmatch(value)}


def front_matter(fields: Mapping[str, Any]) -> str:
    """The YAML at the start of a card, between its lines of dashes."""
    import yaml

    added = {**fields, "library_name": "diffusers"}
    tags = "tags: [pixel-diffusion, flow-matching, asymflow, liftkit]\n"
    return f"---\n{yaml.safe_dump(added, sort_keys=False, allow_unicode=True)}{tags}---\n"


def plain_name(name: str) -> str:
    """A name that means nothing to Markdown, HTML, YAML or Python: letters, digits and ``. - _ + /``; others become ``_``."""
    return "".join(each if each.isalnum() or each in ".-_+/ " else "_" for each in name)[:200] or "_"
