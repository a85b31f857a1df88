"""Folders in the making: each is held by the run that makes it, and one that nobody holds is left of a killed run.

A run holds its folder by a lock of the kernel (flock), which goes when the process does, however it ends, and which holds
across containers and threads, where process numbers say nothing. Where the file system knows no such locks, the
process number in the folder's name has to do.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

SUFFIX = ".liftkit-partial"
_UNSUPPORTED = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EBADF, errno.ENOSYS, errno.EINVAL)


@contextmanager
def claimed(place: Path) -> Iterator[Path]:
    """A new folder beside ``place``, held by this run; what is left of it at the end goes."""
    building, handle = _claim(place)
    try:
        yield building
    finally:
        shutil.rmtree(building, ignore_errors=True)
        os.close(handle)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold an existing folder, if nobody else does; goes on in any case."""
    handle = _open(folder)
    try:
        _lock(handle)
        yield
    finally:
        os.close(handle)


def retired(building: Path) -> Path:
    """Where a folder that is about to be replaced is set aside."""
    return building.with_name(f"{building.name.removesuffix(SUFFIX)}.old{SUFFIX}")


def settle(aside: Path, place: Path) -> None:
    """End a replacement, however far it came: the folder set aside goes once its place is taken, else it returns."""
    if place.exists():
        shutil.rmtree(aside, ignore_errors=True)
    else:
        os.rename(aside, place)


def sweep(place: Path) -> int | None:
    """Put in order what killed runs left beside a folder: half-made ones go, one set aside returns to its place.

    Returns:
        The process number of a run that is making the folder now, or None.
    """
    pattern = re.compile(rf"\.{re.escape(place.name)}\.(\d+)(-[0-9a-f]+)?(\.old)?{re.escape(SUFFIX)}")
    maker = None
    for leftover in sorted(place.parent.glob(f".*{SUFFIX}")):
        match = pattern.fullmatch(leftover.name)
        if match is None:
            continue
        if _is_held(leftover, int(match[1])):
            maker = int(match[1])
        elif match[3]:
            # Another run may be at the same.
            with suppress(FileNotFoundError):
                settle(leftover, place)
        else:
            shutil.rmtree(leftover, ignore_errors=True)
    return maker


def _claim(place: Path) -> tuple[Path, int]:
    while True:
        building = place.with_name(f".{place.name}.{os.getpid()}-{secrets.token_hex(4)}{SUFFIX}")
        building.mkdir()
        handle = _open(building)
        # Between the two lines another run may have taken the new folder for a dead one's.
        if _lock(handle) is not False and building.exists():
            return building, handle
        os.close(handle)


def _open(folder: Path) -> int:
    return os.open(folder, os.O_RDONLY | os.O_CLOEXEC)


def _lock(handle: int) -> bool | None:
    """Take a lock; whether it could be had, or None where there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return None
        return False
    return True


def _is_held(folder: Path, process: int) -> bool:
    try:
        handle = _open(folder)
    except OSError:
        return False
    try:
        free = _lock(handle)
    finally:
        os.close(handle)
    return _alive(process) if free is None else not free


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
