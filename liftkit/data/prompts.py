"""Files of prompts: plain text with one a line, or a table whose entries hold one each."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from liftkit.checkpoint.text import lines, read_text
from liftkit.data import demo
from liftkit.data.captions import CAPTION_KEYS, caption_of
from liftkit.data.metadata import csv_rows
from liftkit.errors import UsageError

LINES = (".jsonl", ".ndjson")
TABLES = (".csv", ".tsv")
_NO_TEXT = (".parquet", ".arrow", ".xlsx", ".yaml", ".yml", ".toml", ".xml", ".html")


def read_prompts(path: Path | None) -> list[str]:
    """Prompts; those of the demo data where there is no file.

    Args:
        path: a plain text file with one prompt a line; ``.jsonl`` with a text or an object in each line, ``.json`` with a
            list of them, ``.csv`` or ``.tsv`` with a line of column names. Of objects and rows ``text``, ``caption`` or
            ``prompt`` counts.

    Raises:
        UsageError: if the file cannot be read, holds no prompt, or has an entry without one.
    """
    if path is None:
        return [scene.prompt for scene in demo.all_scenes()]
    ending, where = path.suffix.lower(), f"--prompts {path}"
    if ending in _NO_TEXT:
        raise UsageError(
            f"{where}: {ending} files of prompts are not read; give .txt with one a line, .jsonl, .json or .csv"
        )
    text = read_text(path)
    if ending in LINES:
        entries: Iterator[tuple[int, Any]] = (
            (number, _parsed(line, f"{where}:{number}")) for number, line in lines(text)
        )
    elif ending == ".json":
        entries = enumerate(_listed(_parsed(text, where), where), start=1)
    elif ending in TABLES:
        entries = csv_rows((f"{line}\n" for line in text.split("\n")), where, CAPTION_KEYS)
    else:
        entries = lines(text)
    prompts = [_prompt(entry, f"{where}:{number}") for number, entry in entries]
    if not prompts:
        raise UsageError(f"{where}: the file holds no prompt")
    return prompts


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f'{where}: expected JSON such as {{"text": "a prompt"}}, found {text[:60].strip()!r}'
        ) from error


def _listed(found: Any, where: str) -> list[Any]:
    """The entries of a JSON file, be it a list or an object that holds nothing but one."""
    if isinstance(found, dict) and len(found) == 1:
        found = next(iter(found.values()))
    if not isinstance(found, list):
        raise UsageError(f"{where}: expected a list of prompts, found {type(found).__name__}")
    return found


def _prompt(entry: Any, where: str) -> str:
    """The prompt of an entry.

    Raises:
        UsageError: if it holds none.
    """
    found = entry.strip() if isinstance(entry, str) else caption_of(entry) if isinstance(entry, dict) else ""
    if not found:
        raise UsageError(
            f"{where}: no prompt; expected a text, or {', '.join(CAPTION_KEYS)}, found {str(entry)[:60]!r}"
        )
    return found
