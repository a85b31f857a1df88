"""Which caption belongs to which picture: files beside pictures, and lines of metadata, in folders and in tar files alike.

Everything here works on names with ``/`` in composed form (NFC), as :func:`plain_name` makes them.
"""

from __future__ import annotations

import csv
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import PurePosixPath
from typing import Any

from liftkit.errors import UsageError
from liftkit.tally import Tally

CAPTION_KEYS = ("text", "caption", "prompt")
"""Where metadata keep a caption, the first that is there."""
SIDECARS = (".txt", ".caption", ".json")
"""Endings of files beside a picture that hold its caption, the first that is there."""
WITHOUT = "without text, caption or prompt"
NOT_TAKEN = "of a kind that is not read"
METADATA_LINES = "metadata.jsonl"
METADATA = (METADATA_LINES, "metadata.csv")
CAPTION_LIMIT = 1024 * 1024
"""Bytes of a caption's file at most."""

_NO_CAPTIONS = re.compile(
    r"(read ?me|licen[cs]e|copying|credits?|attributions?|notes?|requirements|changelog|authors?)\b", re.I
)
_CAPTION_TEXTS = ("txt", "text", "caption", "captions", "cap", "prompt", "prompts", "tag", "tags", "wd14")
_TABLES = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".xlsx")
_CAPTION_TABLE = re.compile(r"meta|capt|label|annot|prompt|tags?\b|text|data", re.I)
_HALF = re.compile("[\ud800-\udfff]")
NAMED = 20
"""Lines without a picture that are named; all are counted."""

Metadata = Iterator[tuple[int, dict[str, Any]]]


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
    _check_characters(entry, where)
    return entry


def _check_characters(entry: dict[str, Any], where: str) -> None:
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
    for name in others:
        stem, dot, ending = name.rpartition(".")
        if dot and f".{ending.lower()}" in SIDECARS:
            by_stem.setdefault(stem, {})[f".{ending.lower()}"] = name
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
    left = {}
    for name in (name for names in by_stem.values() for name in names.values() if name not in used):
        if name not in claimed:
            left[name] = "that belong to no picture"
        elif not name.lower().endswith(".json"):  # beside a text that is the rule, and holds other things
            left[name] = "beside another one that is taken"
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


def metadata_kind(name: str) -> str | None:
    """``jsonl`` or ``csv`` for a metadata file by its name, else None."""
    base = PurePosixPath(name).name.lower()
    return base.rpartition(".")[2] if base in METADATA else None


def read_metadata(kind: str, text: Iterator[str], where: str) -> Metadata:
    """The entries of a metadata file with the numbers of their lines, one at a time.

    Args:
        kind: ``jsonl`` or ``csv``.
        text: its lines, with their ends.
        where: what to call it in messages.

    Raises:
        UsageError: naming the first line that is no entry with a ``file_name``.
    """
    return csv_rows(text, where, ("file_name",)) if kind == "csv" else _json_entries(text, where)


def _json_entries(text: Iterator[str], where: str) -> Metadata:
    for number, line in enumerate(text, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        if not isinstance(entry, dict) or not isinstance(entry.get("file_name"), str):
            raise UsageError(
                f'{where}:{number}: expected {{"file_name": "...", "text": "..."}}, found {line[:60].strip()!r}'
            )
        _check_characters(entry, f"{where}:{number}")
        yield number, entry


def csv_rows(text: Iterator[str], where: str, needs: Sequence[str]) -> Metadata:
    """The rows of a table with a line of column names, by column, with the numbers of their lines.

    Args:
        text: its lines, with their ends.
        where: what to call it in messages.
        needs: columns one of which it must have.

    Raises:
        UsageError: naming the line, if it is no such table.
    """
    # A spreadsheet may begin with blank lines, and with one that names its separator.
    begins = (each for each in enumerate(text) if each[1].strip() and not each[1].lower().startswith("sep="))
    before, head = next(begins, (0, ""))
    separator = max(",;\t", key=head.count)
    reader = csv.reader(chain([head], text), delimiter=separator, skipinitialspace=True, strict=True)
    try:
        columns = [column.strip() for column in next(reader, [])]
        if not set(needs) & set(columns):
            one = " or ".join(needs) if len(needs) > 1 else f"{needs[0]}, and text"
            raise UsageError(f"{where}: expected a column {one}, found {', '.join(columns)[:80]!r}")
        for row in reader:
            if len(row) > len(columns):
                raise UsageError(
                    f"{where}:{reader.line_num + before}: {len(row)} values in {len(columns)} columns; put quotes around a text "
                    f"with {separator!r} in it"
                )
            if row:
                yield reader.line_num + before, dict(zip(columns, row))
    except csv.Error as error:
        raise UsageError(
            f"{where}:{reader.line_num + before}: no CSV ({error}); are all quotes closed and doubled inside of a text, and do "
            "lines end in \\n?"
        ) from error


@dataclass
class Captions:
    """Captions of pictures by metadata.

    Args:
        pictures: their plain names.

    Attributes:
        lines: the account of the lines of metadata.
    """

    pictures: list[str]
    lines: Tally = field(default_factory=lambda: Tally("lines of metadata"))

    def __post_init__(self) -> None:
        self._known = set(self.pictures)
        self._captions: dict[str, tuple[str, str, str]] = {}
        self._tails: dict[str, list[str]] = {}
        for picture in self.pictures:
            self._tails.setdefault(PurePosixPath(picture).name, []).append(picture)

    def get(self, picture: str) -> str:
        """The caption of a picture, empty where no line names it."""
        return self._captions.get(picture, ("", "", ""))[0]

    def add(self, folder: str, entries: Metadata, where: str) -> None:
        """Take the captions of one metadata file; it goes before those that were added earlier.

        Args:
            folder: plain name of the folder that its names begin at; empty for the outermost.
            entries: of the file.
            where: what to call it in messages.
        """
        here: dict[str, tuple[str, str, str]] = {}
        for number, entry in entries:
            name = entry["file_name"]
            line = f"{where}:{number} {name}"
            picture, reason = self._picture(folder, name)
            if picture is None:
                self._leave_out(line, reason)
            elif not has_caption(entry):
                self._leave_out(line, WITHOUT)
            elif picture in here and here[picture][1] != name and _is_absolute(name):
                # Tails of two foreign paths: nobody knows which one is meant.
                self._leave_out(line, f"for a picture that another line names as {here[picture][1]}")
            else:
                if picture in here:
                    self._leave_out(here[picture][2], "replaced by a later line for the same picture")
                    self.lines.used -= 1
                here[picture] = (caption_of(entry), name, line)
                self.lines.use()
        self._captions |= here

    def _leave_out(self, line: str, reason: str) -> None:
        if len(self.lines.left_out.get(reason, {})) < NAMED:
            self.lines.leave_out(line, reason)
        else:
            self.lines.leave_out_more(reason, 1)

    def _picture(self, folder: str, name: str) -> tuple[str | None, str]:
        """The picture that a name means, or why none."""
        plain = plain_name(name)
        if not _is_absolute(name):
            here = plain_name(f"{folder}/{name}")
            return (here, "") if here in self._known else (None, "that name no picture here")
        # A path of another machine means the picture that shares the longest tail with it, if there is just one.
        best: list[str] = []
        shared = 0
        for picture in self._tails.get(PurePosixPath(plain).name, []):
            length = _shared_tail(picture, plain)
            best, shared = ([picture], length) if length > shared else (best + [picture] * (length == shared), shared)
        if len(best) == 1:
            return best[0], ""
        return None, "whose path of another machine means several pictures" if best else "that name no picture here"


def _is_absolute(name: str) -> bool:
    """Whether a path begins at the root of some machine, on Windows or elsewhere."""
    return name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:[\\/]", name) is not None


def _shared_tail(one: str, other: str) -> int:
    """How many last parts of two paths agree."""
    count = 0
    for a, b in zip(reversed(one.split("/")), reversed(other.split("/"))):
        if a != b:
            break
        count += 1
    return count
