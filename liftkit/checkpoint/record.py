"""``liftkit.json``, the record in every folder that liftkit makes, checked when it is read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from liftkit.checkpoint.files import write_text
from liftkit.checkpoint.folder import RECORD, manifest
from liftkit.checkpoint.follow import digest_file
from liftkit.checkpoint.hashing import OLDER, TABLE, algorithm_of, as_word, named_digests
from liftkit.checkpoint.model import read_json
from liftkit.errors import UsageError

BEGUN = "liftkit.init"
"""The format that the record of a model names that was made from nothing; it stays when the model learns."""
PACKAGES = ("liftkit", "torch", "diffusers", "transformers", "safetensors", "numpy")
TABLES = (
    "source",
    "options",
    "versions",
    "proof",
    OLDER,
    TABLE,
    "tensors",
    "finetune",
    "finetune.recipe",
    "finetune.recipe.trainable",
)
"""Entries that are tables where they are there; all others are plain."""


def read_record(folder: Path) -> dict[str, Any]:
    """The record of a folder; empty where there is none. Digests are words in one table, whatever version wrote it.

    Raises:
        UsageError: if it is no JSON, or an entry is of another type than liftkit writes.
    """
    path = folder / RECORD
    if not path.exists():
        return {}
    record = read_json(path)
    for key in TABLES:
        place: Any = record
        for name in key.split("."):
            place = place.get(name) if place else None
            if not isinstance(place, dict | None):
                raise UsageError(f"{path}: {key} is a {type(place).__name__}, expected a table; make the folder again")
    source = record.get("source") or {}
    words = [("source.model", source.get("model", "")), ("source.class", source.get("class", ""))]
    words += [
        (f"{table}.{name}", digest) for table in (OLDER, TABLE) for name, digest in (record.get(table) or {}).items()
    ]
    for key, value in words:
        if not isinstance(value, str):
            raise UsageError(f"{path}: {key} is {str(value)[:60]}, expected text; make the folder again")
    if record.get("proof") is not None:
        _check_proof(record["proof"], path)
    record[TABLE] = named_digests(record)
    for name, digest in record[TABLE].items():
        try:
            algorithm_of(digest)
        except ValueError as error:
            raise UsageError(
                f"{path}: {TABLE}.{name}: {error}; make the folder again, or use a newer liftkit"
            ) from error
    record["tensors"] = {as_word(digest): sums for digest, sums in (record.get("tensors") or {}).items()}
    empty = {key for key in (TABLE, "tensors") if not record[key]}
    return {key: value for key, value in record.items() if value is not None and key not in {OLDER, *empty}}


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write the record of a folder, last of its files: what it says, and the digests of all files.

    Args:
        folder: in the making.
        record: without digests, or with those of another folder that it began from.
    """
    found = {key: value for key, value in record.items() if key not in (OLDER, TABLE)}
    write_text(folder / RECORD, json.dumps({**found, TABLE: manifest(folder)}, indent=2) + "\n")


def _check_proof(proof: dict[str, Any], path: Path) -> None:
    from liftkit.figures import Proof, check

    try:
        check(Proof, proof, "proof")
    except ValueError as error:
        raise UsageError(f"{path}: {error}; convert again") from error


def versions() -> dict[str, str]:
    """Versions of what took part, from package metadata."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def transformer_digests(folder: Path) -> dict[str, str]:
    """Of the weight files of the transformer in a folder, by their paths, as its record has them."""
    sums = read_record(folder).get(TABLE, {})
    return {
        name: value for name, value in sums.items() if name.startswith("transformer/") and name.endswith(".safetensors")
    }


def like(wanted: Mapping[str, str], found: Mapping[str, str], folder: Path) -> dict[str, str]:
    """Digests of a folder's files as its record has them, but for those that another record has by another hash: these are
    taken anew, by that hash.

    Args:
        wanted: digests of the other record, by path.
        found: digests of the folder's own record, by path.
        folder: with the files.

    Raises:
        UsageError: if the other record has a digest by a hash that this version does not know.
    """

    def taken(name: str, digest: str) -> str:
        other = wanted.get(name, digest)
        if other.partition(":")[0] == digest.partition(":")[0] or not (folder / name).is_file():
            return digest
        try:
            algorithm = algorithm_of(other)
        except ValueError as error:
            raise UsageError(
                f"{folder / name}: cannot be compared with what it was before: {error}; use a newer liftkit, or begin again"
            ) from error
        return digest_file(folder / name, algorithm=algorithm).value

    return {name: taken(name, digest) for name, digest in found.items()}
