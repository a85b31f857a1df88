"""The one reader of text files: captions, prompts, metadata, recipes, and JSON of models.

Text is UTF-8 with or without a byte-order mark, or UTF-16 with one. Lines end at ``\\n`` alone (with ``\\r`` before it or
not): other characters that Unicode calls line ends, such as U+2028 and U+0085, are legal inside of a line of JSON.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from liftkit.checkpoint.header import no_duplicates
from liftkit.checkpoint.source import open_regular, stamp_of
from liftkit.errors import UsageError

TEXT_LIMIT = 64 * 1024 * 1024
"""Bytes of a text file at most, unless a reader says otherwise."""
LINE_LIMIT = 64 * 1024 * 1024
"""Characters of one line of a file that is streamed, at most."""
_CHUNK = 1 << 20
MAX_JSON = 64 * 1024 * 1024
LFS = b"version https://git-lfs"
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_text(path: Path, limit: int = TEXT_LIMIT) -> str:
    """The text of a regular file.

    Args:
        path: of the file; pipes and devices are refused.
        limit: bytes at most.

    Raises:
        UsageError: if it cannot be read, is larger than the limit, or is no text in UTF-8 or UTF-16.
    """
    with open_regular(path) as file:
        return text_of(file, str(path), limit)


def text_of(file: IO[bytes], where: str, limit: int = TEXT_LIMIT) -> str:
    """The text of an open file, called ``where`` in messages; see :func:`read_text`."""
    raw = _read(file, limit + 1)
    if len(raw) > limit:
        raise UsageError(f"{where}: larger than {limit / 1e6:.0f} MB, too large for a text file; is it the right file?")
    return decode_text(raw, where)


def decode_text(raw: bytes, where: str) -> str:
    """Text from bytes.

    Args:
        raw: UTF-8 with or without a byte-order mark, or UTF-16 with one.
        where: what to call the file in a message.

    Raises:
        UsageError: if it is neither.
    """
    encoding = "utf-16" if raw.startswith(_UTF16) else "utf-8-sig"
    try:
        text = raw.decode(encoding).lstrip("\ufeff")  # some editors write a second mark
    except UnicodeDecodeError as error:
        raise UsageError(_no_text(where, error.reason, f"at byte {error.start}")) from error
    if "\0" in text:
        raise UsageError(_no_text(where, "zero bytes, as UTF-16 without a byte-order mark has them", "inside"))
    return text


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        UsageError: if it is missing, huge, ambiguous or no object.
    """
    with open_regular(path) as file:
        if stamp_of(file).size > MAX_JSON:
            raise UsageError(f"{path}: {stamp_of(file).size} bytes of JSON, {MAX_JSON} at most; fetch the file again")
        raw = file.read()
    if raw.startswith(LFS):
        raise UsageError(f"{path}: a git-lfs pointer, not the file itself; run 'git lfs pull'")
    try:
        content = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: no valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def check_unmarked(path: Path) -> None:
    """Raise if a JSON file of a model begins with a byte-order mark, which its libraries do not read.

    Raises:
        UsageError: naming the file.
    """
    with open_regular(path) as file:
        if file.read(len(codecs.BOM_UTF8)).startswith((codecs.BOM_UTF8, *_UTF16)):
            raise UsageError(
                f"{path}: begins with a byte-order mark, with which diffusers and transformers cannot read it; save it in UTF-8 "
                "without one"
            )


def lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, with their numbers from 1; ``\\r`` at their ends goes."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line.removesuffix("\r")


def stream_lines(file: IO[bytes], where: str) -> Iterator[str]:
    """The lines of a text file of any length, read as they are asked for, each with its ``\\n``.

    Args:
        file: at its beginning.
        where: what to call it in a message.

    Raises:
        UsageError: if it is no text in UTF-8 or UTF-16, or a line is longer than :data:`LINE_LIMIT`.
    """
    part = file.read(_CHUNK)
    decoder = codecs.getincrementaldecoder("utf-16" if part.startswith(_UTF16) else "utf-8-sig")()
    done = number = 0
    pieces: list[str] = []
    length = 0
    while True:
        begun = done - len(decoder.getstate()[0])  # a character may have begun in the part before
        try:
            text = decoder.decode(part, final=not part)
        except UnicodeDecodeError as error:
            raise UsageError(_no_text(where, error.reason, f"at byte {begun + error.start}")) from error
        *ended, rest = text.split("\n")
        for each in ended:
            number += 1
            yield "".join([*pieces, each, "\n"])
            pieces, length = [], 0
        pieces.append(rest)
        length += len(rest)
        if length > LINE_LIMIT:
            raise UsageError(
                f"{where}: line {number + 1} is longer than {LINE_LIMIT / 1e6:.0f} MB; is it the right file?"
            )
        if not part:
            break
        if "\0" in text:
            raise UsageError(_no_text(where, "zero bytes, as UTF-16 without a byte-order mark has them", "inside"))
        done += len(part)
        part = file.read(_CHUNK)
    if length:
        yield "".join(pieces)


def printable(text: str) -> str:
    """Text that cannot move a terminal's cursor, change its colors or forge lines.

    Control characters (C0 but tab and newline, DEL, C1), separators of lines and paragraphs, marks of writing direction
    and lone surrogates become their escapes, such as ``\\x1b``.
    """
    return "".join(character if _prints(character) else _escaped(character) for character in text)


def check_prompts(prompts: Iterable[str]) -> None:
    """Raise unless prompts are whole text, which tokenizers take.

    Raises:
        UsageError: naming a prompt with half of a surrogate pair, as bytes on a command line that are no UTF-8, and
            ``\\ud800`` in JSON, leave it.
    """
    for prompt in prompts:
        half = next((character for character in prompt if "\ud800" <= character <= "\udfff"), None)
        if half is not None:
            raise UsageError(f"prompt {prompt[:80]!r}: {half!r} is no character of its own; write the prompt in UTF-8")


def _no_text(where: str, reason: str, place: str) -> str:
    return f"{where}: no UTF-8 text ({reason} {place}); save it in the encoding UTF-8"


def _prints(character: str) -> bool:
    return character.isprintable() or character in "\t\n"


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


def _read(file: IO[bytes], most: int) -> bytes:
    """Up to ``most`` bytes of an unbuffered file, whose every read may give fewer than asked for."""
    parts, left = [], most
    while left and (part := file.read(min(left, 1 << 20))):
        parts.append(part)
        left -= len(part)
    return b"".join(parts)
