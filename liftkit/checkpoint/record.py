"""``liftkit.json``, the record in every folder that liftkit makes, checked when it is read."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from liftkit.checkpoint.model import read_json
from liftkit.errors import UsageError

RECORD = "liftkit.json"
BEGUN = "liftkit.init"
"""The format that the record of a model names that was made from nothing; it stays when the model learns."""
PACKAGES = ("liftkit", "torch", "diffusers", "transformers", "safetensors", "numpy")
TABLES = (
    "source",
    "options",
    "versions",
    "proof",
    "sha256",
    "tensors",
    "finetune",
    "finetune.recipe",
    "finetune.recipe.trainable",
)
"""Entries that are tables where they are there; all others are plain."""


def read_record(folder: Path) -> dict[str, Any]:
    """The record of a folder; empty where there is none.

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
    source, digests = record.get("source") or {}, record.get("sha256") or {}
    words = [("source.model", source.get("model", "")), ("source.class", source.get("class", ""))]
    words += [(f"sha256.{name}", digest) for name, digest in digests.items()]
    for key, value in words:
        if not isinstance(value, str):
            raise UsageError(f"{path}: {key} is {str(value)[:60]}, expected text; make the folder again")
    if record.get("proof") is not None:
        _check_proof(record["proof"], path)
    return {key: value for key, value in record.items() if value is not None}


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
    sums = read_record(folder).get("sha256") or {}
    return {
        name: value for name, value in sums.items() if name.startswith("transformer/") and name.endswith(".safetensors")
    }
