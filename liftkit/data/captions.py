"""What holds a caption, and which file beside it belongs to which picture, in folders and in tar files alike.

Everything here works on names with ``/`` in composed form (NFC), as :func:`plain_name` makes them.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Any

from liftkit.errors import UsageError

CAPTION_KEYS = ("text", "caption", "prompt")
"""Where metadata keep a caption, the first that is there."""
SIDECARS = (".txt", ".caption", ".json", ".cls")
"""Endings of files beside a picture that hold its caption, the first that is there."""
WITHOUT = "without text, caption or prompt"
NOT_TAKEN = "of a kind that is not read"
TAKEN_TWICE = "beside another one that is taken"
CAPTION_LIMIT = 1024 * 1024
"""Bytes of a caption's file at most."""

_NO_CAPTIONS = re.compile(
    r"(read ?me|licen[cs]e|copying|credits?|attributions?|notes?|requirements|changelog|authors?)\b", re.I
)
_CAPTION_TEXTS = ("txt", "text", "caption", "captions", "cap", "prompt", "prompts", "tag", "tags", "wd14")
_TABLES = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".xlsx")
_CAPTION_TABLE = re.compile(r"meta|capt|label|annot|prompt|tags?\b|text|data", re.I)
_HALF = re.compile("[\ud800-\udfff]")


def plain_name(name: str) -> str:
    """A path within a folder as it is compared: ``/`` between its parts, composed characters, ``.`` and ``..`` resolved."""
    parts: list[str] = []
    for part in unicodedata.normalize("NFC", name).replace("\\", "/").split("/"):
        if part == ".." and parts and parts[-1] != "..":
            parts.pop()
        elif part not in ("", "."):
            parts.append(part)
    return "/".join(parts)


def caption_of(entry: dict[str, Any]) -> str:
    """The caption of a line of metadata, empty where it has none: the first key with a text; of several in a list, the first."""
    found = (plain_caption(entry.get(key)) for key in CAPTION_KEYS)
    return next(filter(None, found), "")


def has_caption(entry: dict[str, Any]) -> bool:
    """Whether a line of metadata holds a caption, be it an empty one."""
    return any(_first(entry.get(key)) is not None for key in CAPTION_KEYS)


def plain_caption(value: Any) -> str:
    """What a column or a file holds as one caption; empty for a table, which is none."""
    found = _first(value)
    return "" if found is None else str(found).strip()


def _first(value: Any) -> Any:
    """A value, or the first of a list; None for what holds no caption."""
    if isinstance(value, (list, tuple)):
        value = value[0] if value else ""
    return None if isinstance(value, (dict, list, tuple)) else value


def caption_in(text: str, name: str) -> str | None:
    """The caption in a file beside a picture; None where a JSON file holds none.

    Args:
        text: its content.
        name: of the file, which says whether it is JSON, and what to call it in a message.

    Raises:
        UsageError: if JSON is no object.
    """
    if not name.lower().endswith(".json"):
        return text.strip()
    entry = json_object(text, name)
    return caption_of(entry) if has_caption(entry) else None


def json_object(text: str, where: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        UsageError: if it is something else.
    """
    try:
        entry = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: expected a JSON object, found {text[:60]!r}") from error
    if not isinstance(entry, dict):
        raise UsageError(f"{where}: expected a JSON object, found {text[:60]!r}")
    check_characters(entry, where)
    return entry


def check_characters(entry: dict[str, Any], where: str) -> None:
    """Raise unless the captions of an entry are text: JSON can name half of a character, which no tokenizer takes."""
    for key in CAPTION_KEYS:
        if _HALF.search(plain_caption(entry.get(key))):
            raise UsageError(
                f"{where}: {key} holds half of a surrogate pair, which is no character; write the text again"
            )


def sidecars(pictures: Iterable[str], others: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
    """The file beside each picture that holds its caption.

    ``a.txt``, ``a.caption`` and ``a.json`` belong to ``a.png``, and so do ``a.png.txt`` and the like; endings may be in
    capitals. The first kind that is there is taken.

    Args:
        pictures: plain names.
        others: plain names of the other files.

    Returns:
        The other file by picture; and why those are left out that could hold a caption and are not taken.
    """
    by_stem: dict[str, dict[str, str]] = {}
    doubles = {}
    # Endings in small letters first, where a.txt and a.TXT are both there.
    for name in sorted(others, key=lambda name: (name != name.lower(), name)):
        stem, dot, ending = name.rpartition(".")
        if dot and f".{ending.lower()}" in SIDECARS:
            first = by_stem.setdefault(stem, {}).setdefault(f".{ending.lower()}", name)
            if first != name:
                doubles[name] = TAKEN_TWICE
    taken: dict[str, str] = {}
    claimed: set[str] = set()
    for picture in pictures:
        for stem in (picture, picture.rpartition(".")[0] or picture):
            for ending in SIDECARS:
                found = by_stem.get(stem, {}).get(ending)
                if found is not None:
                    claimed.add(found)
                    # The longer name, a.png.txt, can mean this picture alone.
                    taken.setdefault(picture, found)
    used = set(taken.values())
    left = doubles
    for name in (name for names in by_stem.values() for name in names.values() if name not in used):
        if name not in claimed:
            left[name] = "that belong to no picture"
        elif not name.lower().endswith(".json"):  # beside a text that is the rule, and holds other things
            left[name] = TAKEN_TWICE
    return taken, left


def looks_like_captions(name: str) -> bool:
    """Whether a file that no picture claims may have been meant to hold captions, by its name."""
    base = PurePosixPath(name).name
    stem, _, ending = base.lower().rpartition(".")
    if _NO_CAPTIONS.match(base):
        return False
    if ending in _CAPTION_TEXTS:
        return True
    return f".{ending}" in _TABLES or (ending in ("json", "yaml", "yml", "xml") and bool(_CAPTION_TABLE.search(stem)))
