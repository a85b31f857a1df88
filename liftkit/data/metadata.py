"""Captions by metadata: ``metadata.jsonl`` and ``metadata.csv``, whose lines name a picture and hold its caption.

Everything here works on names with ``/`` in composed form (NFC), as :func:`plain_name` makes them.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from liftkit.data.captions import WITHOUT, caption_of, check_characters, has_caption, plain_name
from liftkit.errors import UsageError
from liftkit.tally import Tally

METADATA_LINES = "metadata.jsonl"
METADATA = (METADATA_LINES, "metadata.csv")
NAMED = 20
"""Lines without a picture that are named; all are counted."""

Entries = Iterator[tuple[int, dict[str, Any]]]
"""Lines of metadata with their numbers."""


def metadata_kind(name: str) -> str | None:
    """``jsonl`` or ``csv`` for a metadata file by its name, else None."""
    base = PurePosixPath(name).name.lower()
    return base.rpartition(".")[2] if base in METADATA else None


def read_metadata(kind: str, text: Iterator[str], where: str) -> Entries:
    """The entries of a metadata file with the numbers of their lines, one at a time.

    Args:
        kind: ``jsonl`` or ``csv``.
        text: its lines, with their ends.
        where: what to call it in messages.

    Raises:
        UsageError: naming the first line that is no entry with a ``file_name``.
    """
    return csv_rows(text, where, ("file_name",)) if kind == "csv" else _json_entries(text, where)


def _json_entries(text: Iterator[str], where: str) -> Entries:
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
        check_characters(entry, f"{where}:{number}")
        yield number, entry


def csv_rows(text: Iterator[str], where: str, needs: Sequence[str]) -> Entries:
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


class _Line(NamedTuple):
    """What is taken of a line: its caption, the name that it gives its picture, where it stands, and the names of the pictures
    that its picture was made from, with the pictures that they mean, or why none."""

    caption: str = ""
    name: str = ""
    where: str = ""
    references: tuple[tuple[str, str | None, str], ...] = ()


class Metadata:
    """Captions of pictures by metadata, and the pictures that they were made from.

    Args:
        pictures: their plain names.
        lines: the account of the lines of metadata.
        reference_column: names the picture, or a list of those, that a line's picture was made from.
    """

    def __init__(self, pictures: Iterable[str], lines: Tally, reference_column: str | None = None) -> None:
        self.lines, self.reference_column = lines, reference_column
        self._known = set(pictures)
        self._captions: dict[str, _Line] = {}
        self._tails: dict[str, list[str]] = {}
        for picture in pictures:
            self._tails.setdefault(PurePosixPath(picture).name, []).append(picture)

    def of(self, picture: str) -> str:
        """The caption of a picture, empty where no line names it."""
        return self._captions.get(picture, _Line()).caption

    def references(self, picture: str) -> tuple[tuple[str, str | None, str], ...]:
        """The names of the pictures that one was made from, with the plain name that each means, or None and why."""
        return self._captions.get(picture, _Line()).references

    def add(self, folder: str, entries: Entries, where: str) -> None:
        """Take the captions of one metadata file; it goes before those that were added earlier.

        Args:
            folder: plain name of the folder that its names begin at; empty for the outermost.
            entries: of the file.
            where: what to call it in messages.
        """
        here: dict[str, _Line] = {}
        for number, entry in entries:
            name = entry["file_name"]
            line = f"{where}:{number} {name}"
            picture, reason = self._picture(folder, name)
            if picture is None:
                self._leave_out(line, reason)
            elif not has_caption(entry) and not self._named(entry):
                self._leave_out(line, WITHOUT)
            elif picture in here and here[picture].name != name and _is_absolute(name):
                # Tails of two foreign paths: nobody knows which one is meant.
                self._leave_out(line, f"for a picture that another line names as {here[picture].name}")
            else:
                if picture in here:
                    self._leave_out(here[picture].where, "replaced by a later line for the same picture")
                    self.lines.used -= 1
                references = tuple((each, *self._picture(folder, each)) for each in self._named(entry))
                here[picture] = _Line(caption_of(entry), name, line, references)
                self.lines.use()
        self._captions |= here

    def _named(self, entry: dict[str, Any]) -> list[str]:
        """The names in the column of references."""
        value = entry.get(self.reference_column) if self.reference_column is not None else None
        return [str(each) for each in (value if isinstance(value, list) else [value]) if each not in (None, "")]

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
