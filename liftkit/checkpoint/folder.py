"""Folders that appear whole or not at all, and the manifest that lets them be checked."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from liftkit.checkpoint.files import reason, sync_folder
from liftkit.errors import LiftkitError, UsageError

SUFFIX = ".liftkit-partial"
RECORD = "liftkit.json"
"""The manifest in every folder that a conversion makes: what tells it from a user's own."""


def check_target(target: Path, *, overwrite: bool) -> None:
    """Whether an output folder may be made; what killed runs left of it is put in order first.

    Raises:
        UsageError: if it exists and may not be replaced, or its parent does not exist or cannot be written.
    """
    place = _place(target)
    if not place.parent.is_dir():
        raise UsageError(f"{place.parent}: no such folder; make it first")
    if not os.access(place.parent, os.W_OK):
        raise UsageError(f"{place.parent}: not writable; choose another output")
    _sweep(place)
    _check_free(target, overwrite)


def check_space(target: Path, needed: int) -> None:
    """Whether the disk of a folder-to-be has room.

    Raises:
        UsageError: with both numbers.
    """
    free = shutil.disk_usage(_place(target).parent).free
    if needed > free:
        raise UsageError(
            f"{target}: {needed / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free on that disk; "
            "make room or choose another output"
        )


@contextmanager
def atomic_folder(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary sibling that takes ``target``'s place when the block ends well, and goes otherwise.

    Where ``target`` is a link, the folder behind it is replaced and the link stays.

    Raises:
        UsageError: see :func:`check_target`.
        LiftkitError: if the disk refuses.
    """
    check_target(target, overwrite=overwrite)
    place = _place(target)
    building = _sibling(place)
    try:
        building.mkdir()
        yield building
        _sync(building)
        # Again: much can have happened since the work began.
        _check_free(target, overwrite)
        _replace(place, building)
        sync_folder(place.parent)
    except OSError as error:
        raise LiftkitError(f"{error.filename or target}: {reason(error)}; nothing was left behind") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)


def copy_tree(source: Path, target: Path) -> None:
    """Copy a file or a folder; links are followed, and modes are the umask's."""
    if source.is_dir():
        target.mkdir(exist_ok=True)
        for child in sorted(source.iterdir()):
            copy_tree(child, target / child.name)
    else:
        shutil.copyfile(source, target)


def tree_size(path: Path) -> int:
    """Bytes of the files in a tree."""
    return (
        sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) if path.is_dir() else path.stat().st_size
    )


def sha256(path: Path, progress: Callable[[int], None] = lambda count: None) -> str:
    """Hexadecimal SHA-256 of a file; ``progress`` is told the bytes, piece by piece."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while piece := file.read(8 * 1024 * 1024):
            digest.update(piece)
            progress(len(piece))
    return digest.hexdigest()


def manifest(folder: Path, progress: Callable[[int], None] = lambda count: None) -> dict[str, str]:
    """SHA-256 of every file below a folder, by relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256(path, progress) for path in files}


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_dir():
            sync_folder(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())
    sync_folder(folder)


def _place(target: Path) -> Path:
    """Where a target really is: ``.`` has no name to rename, and a link is not the folder behind it."""
    return Path(os.path.realpath(target))


def _check_free(target: Path, overwrite: bool) -> None:
    """Whether nothing is at a target, or something that may be replaced."""
    place = _place(target)
    if not place.exists():
        return
    if not place.is_dir():
        raise UsageError(f"{target}: is a file; the output is a folder")
    if os.path.ismount(place):
        raise UsageError(f"{target}: is a mount point, which cannot be renamed; choose a folder inside it")
    if not overwrite:
        raise UsageError(f"{target}: exists already; choose another output or pass --overwrite")
    if any(place.iterdir()) and not (place / RECORD).is_file():
        raise UsageError(
            f"{target}: holds files but no {RECORD}, so it is no folder that liftkit made; "
            "remove it or choose another output"
        )


def _sibling(place: Path, kind: str = "") -> Path:
    """A name beside a folder for this process; :func:`_sweep` knows it."""
    return place.with_name(f".{place.name}.{os.getpid()}{kind}{SUFFIX}")


def _replace(place: Path, building: Path) -> None:
    """Rename a finished folder to its place, and remove the one that was there."""
    if not place.exists():
        os.rename(building, place)
        return
    retired = _sibling(place, ".old")
    try:
        os.rename(place, retired)
        os.rename(building, place)
    finally:
        _settle(retired, place)


def _settle(retired: Path, place: Path) -> None:
    """End a replacement, however far it came: the old folder goes once its place is taken, else it returns."""
    if place.exists():
        shutil.rmtree(retired, ignore_errors=True)
    else:
        os.rename(retired, place)


def _sweep(place: Path) -> None:
    """Put in order what killed runs left beside a folder: half-made ones go, one set aside returns to its place."""
    pattern = re.compile(rf"\.{re.escape(place.name)}\.(\d+)(\.old)?{re.escape(SUFFIX)}")
    for leftover in sorted(place.parent.glob(f".*{SUFFIX}")):
        match = pattern.fullmatch(leftover.name)
        if match is None or _alive(int(match[1])):
            continue
        if match[2]:
            _settle(leftover, place)
        else:
            shutil.rmtree(leftover, ignore_errors=True)


def _alive(process: int) -> bool:
    """Whether another process of this number runs; in containers, a run that was killed often had this one's own."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
