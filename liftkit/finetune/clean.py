"""What a finished run no longer needs: its checkpoints and its cache, and nothing that it did not make."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from liftkit.errors import UsageError
from liftkit.finetune.run_folder import RunFolder, resume_command, run_record

_CHECKPOINT = re.compile(r"step-\d+(\.abandoned)?")
_MADE = (".safetensors", ".json")
"""Endings of all that checkpoints and caches hold."""


@dataclass(frozen=True)
class Leftovers:
    """What may be deleted of a finished run.

    Args:
        checkpoints: files of its checkpoints, abandoned ones too.
        cache: files of its own cache; one that a recipe keeps elsewhere is not the run's.
    """

    checkpoints: list[Path]
    cache: list[Path]

    @property
    def files(self) -> list[Path]:
        """All of them."""
        return [*self.checkpoints, *self.cache]

    @property
    def size(self) -> int:
        """Bytes of all of them."""
        return sum(path.stat().st_size for path in self.files)


def leftovers(run: Path) -> Leftovers:
    """What may be deleted of a run.

    Raises:
        UsageError: if the folder is no run, or the run is not finished.
    """
    if not run_record(run):
        raise UsageError(f"{run}: no run of liftkit finetune (no run.json of one there); nothing was deleted")
    if not any((run / name / "liftkit.json").is_file() for name in ("model", "adapter")):
        raise UsageError(
            f"{run}: not finished, so that its checkpoints are all it has; finish it by {resume_command(run)}, "
            "or delete the folder yourself"
        )
    return find(run)


def find(run: Path) -> Leftovers:
    """Checkpoints and cache in a folder, without asking whether they may go."""
    places = _folders(run / "checkpoints")
    kept = [path for place in places if _CHECKPOINT.fullmatch(place.name) for path in _files(place)]
    cache = [path for path in _files(run / "cache") if path.name == "files.json"]
    cache += [path for part in _folders(run / "cache") if part.name in ("prompts", "latents") for path in _tree(part)]
    return Leftovers(kept, cache)


def clean(run: Path) -> int:
    """Delete what a finished run no longer needs; the bytes that this frees.

    Raises:
        UsageError: see :func:`leftovers`; or the run is going on.
    """
    leftovers(run)
    with RunFolder(run).held():
        found = leftovers(run)
        freed = found.size
        for path in found.files:
            path.unlink(missing_ok=True)
        for name in ("checkpoints", "cache"):
            _remove_empty(run / name)
    return freed


def _folders(place: Path) -> list[Path]:
    """Real folders in a real folder; links lead elsewhere and are left alone."""
    if place.is_symlink() or not place.is_dir():
        return []
    return [path for path in sorted(place.iterdir()) if path.is_dir() and not path.is_symlink()]


def _files(place: Path) -> list[Path]:
    """Files in a real folder whose names are those of what a run writes."""
    if place.is_symlink() or not place.is_dir():
        return []
    files = (path for path in sorted(place.iterdir()) if path.is_file() and not path.is_symlink())
    return [path for path in files if path.suffix in _MADE]


def _tree(place: Path) -> Iterator[Path]:
    yield from _files(place)
    for inner in _folders(place):
        yield from _tree(inner)


def _remove_empty(place: Path) -> None:
    """Remove a folder and those in it, as far as they are empty."""
    for inner in _folders(place):
        _remove_empty(inner)
    if not place.is_symlink():
        with suppress(OSError):
            place.rmdir()
