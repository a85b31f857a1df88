"""Folders that appear whole or not at all, and the manifest that lets them be checked."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from liftkit.checkpoint.files import reason, sync
from liftkit.checkpoint.follow import Digest, digest_file, digest_files
from liftkit.checkpoint.hashing import CHOSEN, OLDER, hexadecimal
from liftkit.checkpoint.leftovers import backup_path, finish_swap, sweep
from liftkit.checkpoint.lock import SUFFIX, claim, claimed, held
from liftkit.checkpoint.source import list_files
from liftkit.errors import LiftkitError, UsageError

__all__ = [
    "RECORD",
    "SUFFIX",
    "atomic_folder",
    "check_space",
    "check_target",
    "copy_tree",
    "manifest",
    "output_folder",
    "tree_size",
]
RECORD = "liftkit.json"
"""The manifest in every folder that a conversion makes: what tells it from a user's own."""
SYNCING = 8
"""Files that are waited for at once."""


@contextmanager
def output_folder(target: Path, *, overwrite: bool) -> Iterator[None]:
    """Hold a folder that is to be made by the end of the block; what killed runs left of it is put in order first.

    Raises:
        UsageError: if it exists and may not be replaced, another run is making it, or its parent does not exist or
            cannot be written.
    """
    place = _place(target)
    if not place.parent.is_dir():
        raise UsageError(f"{place.parent}: no such folder; make it first")
    if not os.access(place.parent, os.W_OK):
        raise UsageError(f"{place.parent}: not writable; choose another output")
    with claim(target):
        maker = sweep(place)
        # Where there are no locks, the name of what it has begun says so too.
        if maker is not None:
            raise UsageError(
                f"{target}: another run (process {maker}) is making it; wait for it or choose another output"
            )
        _check_free(target, overwrite)
        yield


def check_target(target: Path, *, overwrite: bool) -> None:
    """Raise unless an output folder may be made; see :func:`output_folder`."""
    with output_folder(target, overwrite=overwrite):
        pass


def check_space(target: Path, needed: int) -> None:
    """Raise unless the disk of a folder-to-be has room.

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
        UsageError: see :func:`output_folder`.
        LiftkitError: if the disk refuses; or the new folder is in its place, but the old one could not be removed.
    """
    place = _place(target)
    try:
        with output_folder(target, overwrite=overwrite), claimed(place) as building:
            yield building
            _sync(building)
            # Again: much can have happened since the work began.
            _check_free(target, overwrite)
            _replace(target, place, building)
            sync(place.parent)
    except OSError as error:
        raise LiftkitError(f"{error.filename or target}: {reason(error)}; nothing was left behind") from error


def copy_tree(source: Path, target: Path) -> None:
    """Copy a file or a folder; links are followed, and modes are the umask's.

    Raises:
        UsageError: see :func:`liftkit.checkpoint.source.list_files`.
    """
    if not source.is_dir():
        shutil.copyfile(source, target)
        return
    target.mkdir(exist_ok=True)
    for path in list_files(source):
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, place)


def tree_size(path: Path) -> int:
    """Bytes of the files in a tree."""
    return (
        sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) if path.is_dir() else path.stat().st_size
    )


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, to compare with what hubs and authors publish of theirs."""
    return hexadecimal(digest_file(path, algorithm=OLDER).value)


def digests(
    folder: Path,
    known: Mapping[str, Digest] | None = None,
    progress: Callable[[int], None] = lambda count: None,
    algorithm: str = CHOSEN,
) -> dict[str, Digest]:
    """What identifies every file below a folder, by relative path, in order.

    Args:
        folder: where to look.
        known: digests that were taken beside the writing.
        progress: called with the number of bytes read, by one thread after another.
        algorithm: of the digests.
    """
    known = known or {}
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    wanted = {name: (path, algorithm) for name, path in files.items() if name not in known}
    found = {**known, **digest_files(wanted, progress)}
    return {name: found[name] for name in files}


def manifest(
    folder: Path, progress: Callable[[int], None] = lambda count: None, algorithm: str = CHOSEN
) -> dict[str, str]:
    """The digest of every file below a folder, by relative path; see :mod:`liftkit.checkpoint.hashing`."""
    return {name: digest.value for name, digest in digests(folder, None, progress, algorithm).items()}


def _sync(folder: Path) -> None:
    """Wait until the disk has all of a folder: for many files at once, so that it can write them together."""
    paths = list(folder.rglob("*"))
    with ThreadPoolExecutor(max_workers=SYNCING) as pool:
        list(pool.map(sync, [path for path in paths if not path.is_dir()]))
        list(pool.map(sync, [*(path for path in paths if path.is_dir()), folder]))


def _place(target: Path) -> Path:
    """Where a target really is: ``.`` has no name to rename, and a link is not the folder behind it."""
    return Path(os.path.realpath(target))


def _check_free(target: Path, overwrite: bool) -> None:
    """Raise unless nothing is at a target, or something that may be replaced."""
    place = _place(target)
    if not place.exists():
        return
    if not place.is_dir():
        raise UsageError(f"{target}: is a file; the output is a folder")
    if os.path.ismount(place):
        raise UsageError(f"{target}: is a mount point, which cannot be renamed; choose a folder inside it")
    if not overwrite:
        raise UsageError(
            f"{target}: exists already; choose another output, or replace it with --overwrite (overwrite=True in Python)"
        )
    if any(place.iterdir()) and not (place / RECORD).is_file():
        raise UsageError(
            f"{target}: holds files but no {RECORD}, so it is no folder that liftkit made; "
            "remove it or choose another output"
        )


def _replace(target: Path, place: Path, building: Path) -> None:
    """Rename a finished folder to its place, and remove the one that was there."""
    try:
        if not place.exists():
            os.rename(building, place)
            return
        aside, stays = backup_path(building), None
        with held(place):
            try:
                os.rename(place, aside)
                os.rename(building, place)
            finally:
                stays = finish_swap(aside, place) if aside.exists() else None
        if stays is not None:
            raise LiftkitError(
                f"{target}: the new folder is complete and in its place, but the old one could not be removed "
                f"({stays.filename}: {reason(stays)}); remove what is left of it by hand"
            )
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise LiftkitError(
            f"{target}: another run was done first, and its folder stays; this one's was removed"
        ) from error
