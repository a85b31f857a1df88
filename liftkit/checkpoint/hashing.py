"""The choice of a hash for the files that liftkit writes records of: BLAKE3; records of older versions have SHA-256.

BLAKE3 is a tree hash, as strong for this purpose and several times as fast on one processor. A digest is a word such as
``blake3:af13...`` that names the hash it was taken with, so that records of both kinds are read and compared.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from blake3 import blake3

CHOSEN = "blake3"
OLDER = "sha256"
"""Its records are tables of that name, whose digests are bare hexadecimal numbers."""
TABLE = "digests"
"""The table of a record that has the digests of files, by their paths."""


class Hash(Protocol):
    """What hashlib's objects and BLAKE3's have in common."""

    def update(self, data: memoryview, /) -> Any:
        """Take in more bytes."""

    def hexdigest(self) -> str:
        """The digest of all of them, hexadecimal."""


NAMES = {CHOSEN: "BLAKE3", OLDER: "SHA-256"}
"""What people call them."""
_HASHES: dict[str, Callable[[], Hash]] = {CHOSEN: blake3, OLDER: hashlib.sha256}


def new_hash(algorithm: str) -> Hash:
    """A hash that has seen nothing yet.

    Raises:
        KeyError: if it is none of ours.
    """
    return _HASHES[algorithm]()


def word(algorithm: str, hexadecimal: str) -> str:
    """A digest that says how it was taken."""
    return f"{algorithm}:{hexadecimal}"


def algorithm_of(digest: str) -> str:
    """The hash that a digest was taken with.

    Raises:
        ValueError: if it is none that this version knows.
    """
    name, colon, _ = digest.partition(":")
    if not colon or name not in _HASHES:
        raise ValueError(f"{digest[:40]!r} is no digest of {' or '.join(_HASHES)}")
    return name


def hexadecimal(digest: str) -> str:
    """A digest without the name of its hash."""
    return digest.rpartition(":")[2]


def as_word(digest: str) -> str:
    """A digest of any record as a word: bare ones are SHA-256."""
    return digest if ":" in digest else word(OLDER, digest)


def named_digests(record: Mapping[str, Any]) -> dict[str, str]:
    """The digests of files that a record has, of this version or an older one; empty where it has none."""
    older, ours = record.get(OLDER), record.get(TABLE)
    found = {**(older if isinstance(older, dict) else {}), **(ours if isinstance(ours, dict) else {})}
    return {str(name): as_word(str(digest)) for name, digest in found.items()}
