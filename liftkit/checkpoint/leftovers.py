"""What runs that died left beside an output: half-made files and folders go, a folder set aside returns to its place.

Names say whose leftover it is and of which process; a lock (:mod:`liftkit.checkpoint.lock`) says whether that still runs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from liftkit.checkpoint.lock import (
    LOCK,
    SUFFIX,
    is_alive,
    is_named,
    open_to_lock,
    remove,
    temporary_name,
    try_lock,
)

DEPTH = 3
"""How deep liftkit's own folders are: a run's cache keeps latents by what made them."""
_LEFTOVER = re.compile(
    rf"\.(?P<name>.+)\.(?P<process>\d+)(-[0-9a-f]+)?(?P<old>\.old)?(\.part|{re.escape(SUFFIX)})", re.S
)


def backup_path(building: Path) -> Path:
    """Where a folder that is about to be replaced is set aside, whole."""
    return building.with_name(f"{building.name.removesuffix(SUFFIX)}.old{SUFFIX}")


def finish_swap(aside: Path, place: Path) -> OSError | None:
    """End a replacement, however far it came: the folder set aside goes once its place is taken, else it returns.

    Returns:
        Why it could not be removed, or None.
    """
    if not place.exists():
        os.rename(aside, place)
        return None
    return discard(aside, place)


def discard(folder: Path, place: Path | None = None) -> OSError | None:
    """Remove a folder, which first takes a name that :func:`sweep` removes: half of it is never taken for a whole one.

    Args:
        folder: to remove.
        place: whose leftover it is, if not its own.

    Returns:
        Why it could not be removed, or None.
    """
    going = temporary_name(place or folder)
    try:
        os.rename(folder, going)
    except OSError as error:
        return error
    return remove(going)


def sweep(place: Path) -> int | None:
    """Put in order what killed runs left beside an output: half-made ones go, one set aside returns to its place.

    Returns:
        The process number of a run that is making the output now, or None.
    """
    return _sweep_folder(place.parent, place.name)


def sweep_inside(folder: Path) -> None:
    """The same for all outputs in a folder of liftkit's own, and in the folders in it; lock files of the dead go too."""
    for parent, folders, files in os.walk(folder):
        deep = len(Path(parent).relative_to(folder).parts) >= DEPTH
        folders[:] = [] if deep else [name for name in folders if not name.endswith(SUFFIX)]
        _sweep_folder(Path(parent), None)
        for name in files:
            if name.endswith(LOCK) and name.startswith("."):
                _release_dead(Path(parent) / name)


def is_leftover(path: Path) -> bool:
    """Whether a name is one of those that only stand in a folder while something is made in it."""
    return path.name == LOCK or _LEFTOVER.fullmatch(path.name) is not None


def _sweep_folder(parent: Path, name: str | None) -> int | None:
    maker = None
    try:
        found = sorted(each.name for each in os.scandir(parent) if each.name.startswith("."))
    except OSError:
        return None
    for each in found:
        match = _LEFTOVER.fullmatch(each)
        if match is None or (name is not None and match["name"] != name):
            continue
        leftover, process = parent / each, int(match["process"])
        with _if_dead(leftover, process) as dead:
            if not dead:
                maker = process
            elif match["old"]:
                # Another run may be at the same.
                with suppress(FileNotFoundError):
                    finish_swap(leftover, parent / match["name"])
            else:
                remove(leftover)
    return maker


@contextmanager
def _if_dead(leftover: Path, process: int) -> Iterator[bool]:
    """Whether nobody holds a leftover; if so it is held by this run meanwhile."""
    try:
        handle = open_to_lock(leftover)
    except OSError:
        yield True
        return
    try:
        free = try_lock(handle)
        yield free if free is not None else not is_alive(process)
    finally:
        os.close(handle)


def _release_dead(lock: Path) -> None:
    with suppress(OSError):
        handle = open_to_lock(lock)
        try:
            if try_lock(handle) and is_named(handle, lock):
                lock.unlink()
        finally:
            os.close(handle)
