"""A converted folder against its own manifest: files that are missing, added or changed, and tensors that changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from liftkit.checkpoint.folder import RECORD
from liftkit.checkpoint.follow import Digest, digest_files
from liftkit.checkpoint.hashing import NAMES, TABLE, algorithm_of
from liftkit.checkpoint.model import ModelFolder
from liftkit.checkpoint.source import list_files
from liftkit.errors import UsageError
from liftkit.progress import Observer

# What git and the Hub's client put into a folder.
FOREIGN = (".git", ".gitattributes", ".gitignore", ".cache")


def own_files(folder: Path) -> list[Path]:
    """All files of a converted folder but its record and what others put there."""
    home = ModelFolder(folder, str(folder), {}).home
    found = list_files(folder, home)
    return [path for path in found if path.relative_to(folder).parts[0] not in (*FOREIGN, RECORD)]


def compared(folder: Path, record: dict[str, Any], observer: Observer) -> tuple[str, list[str]]:
    """What was compared, on one line, and what is wrong, each on one line.

    Args:
        folder: a converted one.
        record: its ``liftkit.json``.
        observer: shows the progress.

    Raises:
        UsageError: if the record holds no manifest.
    """
    expected, sums = record.get(TABLE), record.get("tensors", {})
    if not expected:
        raise UsageError(f"{folder / RECORD}: it holds no manifest; convert again")
    files = {path.relative_to(folder).as_posix(): path for path in own_files(folder)}
    problems = [f"{name}: missing" for name in sorted(expected.keys() - files.keys())]
    problems += [f"{name}: not in the manifest" for name in sorted(files.keys() - expected.keys())]
    common = sorted(expected.keys() & files.keys())
    total = sum(files[name].stat().st_size for name in common)
    with observer.stage("verify: checksums", total, "bytes") as advance:
        found = digest_files({name: (files[name], algorithm_of(expected[name])) for name in common}, advance)
        for name, digest in found.items():
            if digest.value != expected[name]:
                problems.append(f"{name}: changed{_where(digest, sums.get(expected[name]))}")
            if digest.not_finite:
                problems.append(f"{name}: tensor {digest.not_finite[0]!r} holds NaN or infinite numbers")
    hashes = sorted({NAMES[algorithm_of(expected[name])] for name in common})
    return f"{len(common)} files, {total} bytes, by {' and '.join(hashes)}", problems


def _where(found: Digest, sums: Any) -> str:
    """Which tensors of a changed file have other bytes, as far as their sums tell."""
    if not found.tensors or not isinstance(sums, dict):
        return ""
    names = sorted(name for name in found.tensors.keys() | sums.keys() if found.tensors.get(name) != sums.get(name))
    if not names:
        return ": its header, or the order of its bytes"
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f": tensor {', '.join(map(repr, names[:3]))}{more}"
