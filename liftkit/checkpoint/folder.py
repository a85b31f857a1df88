"""Folders that appear whole or not at all, and the manifest that lets them be checked."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from liftkit.checkpoint.files import sync_folder
from liftkit.errors import LiftkitError, UsageError

SUFFIX = ".liftkit-partial"


def check_target(target: Path, *, overwrite: bool) -> None:
    """Whether an output folder may be made.

    Raises:
        UsageError: if it exists (and may not be replaced), or its parent does not or cannot be written.
    """
    if target.exists() and not overwrite:
        raise UsageError(f"{target}: exists already; choose another output or pass --overwrite")
    if target.exists() and not target.is_dir():
        raise UsageError(f"{target}: is a file; the output is a folder")
    parent = target.absolute().parent
    if not parent.is_dir():
        raise UsageError(f"{parent}: no such folder; make it first")
    if not os.access(parent, os.W_OK):
        raise UsageError(f"{parent}: not writable; choose another output")


def check_space(target: Path, needed: int) -> None:
    """Whether the disk of a folder-to-be has room.

    Raises:
        UsageError: with both numbers.
    """
    free = shutil.disk_usage(target.absolute().parent).free
    if needed > free:
        raise UsageError(
            f"{target}: {needed / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free on that disk; "
            "make room or choose another output"
        )


@contextmanager
def atomic_folder(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary sibling that takes ``target``'s place when the block ends well, and goes otherwise.

    Leftovers of runs that were killed are removed first.

    Raises:
        UsageError: see :func:`check_target`.
        LiftkitError: if the disk refuses.
    """
    check_target(target, overwrite=overwrite)
    _sweep(target)
    building = target.with_name(f".{target.name}.{os.getpid()}{SUFFIX}")
    try:
        building.mkdir()
        yield building
        _sync(building)
        if target.exists():
            # Between these two renames a crash leaves the old folder beside its name, never a mixture.
            retired = target.with_name(f".{target.name}.{os.getpid()}.old{SUFFIX}")
            os.rename(target, retired)
            os.rename(building, target)
            shutil.rmtree(retired)
        else:
            os.rename(building, target)
        sync_folder(target.absolute().parent)
    except OSError as error:
        raise LiftkitError(f"{error.filename or target}: {error.strerror}; nothing was left behind") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)


def link_or_copy(source: Path, target: Path, *, link: bool = False) -> None:
    """Copy a file or a tree (links followed), or hard-link its files where asked and possible."""
    if source.is_dir():
        target.mkdir(exist_ok=True)
        for child in sorted(source.iterdir()):
            link_or_copy(child, target / child.name, link=link)
        return
    if link:
        try:
            os.link(source.resolve(), target)
            return
        except OSError:
            pass
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


def _sweep(target: Path) -> None:
    """Remove what killed runs left beside a target."""
    for leftover in target.absolute().parent.glob(f".{target.name}.*{SUFFIX}"):
        owner = leftover.name.removeprefix(f".{target.name}.").split(".")[0]
        if owner.isdigit() and not _alive(int(owner)):
            shutil.rmtree(leftover, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
