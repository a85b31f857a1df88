"""Outputs are held by the run that makes them; what nobody holds was left by a run that died, and goes
(:mod:`liftkit.checkpoint.leftovers`).

Both are locks of the kernel (flock). They go when the process does, however it ends, and they hold across containers and
threads, where process numbers say nothing. A run holds

* its output, by a lock file that says who it is (:func:`claim`): a second run learns so at once, or waits;
* each file and folder that it has begun, until that gets its name (:func:`claimed`, :func:`claimed_file`).

Where a file system knows no such locks, process numbers have to do.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from liftkit.checkpoint.text import printable
from liftkit.errors import UsageError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

SUFFIX = ".liftkit-partial"
LOCK = ".liftkit-lock"
POLL_SECONDS = 0.2
_UNSUPPORTED = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EBADF, errno.ENOSYS, errno.EINVAL)
_claims: set[tuple[Path, int]] = set()
_begun: dict[Path, int] = {}


# -- an output, held while it is made ---------------------------------------------------------------------------------


@contextmanager
def claim(output: Path, *, inside: bool = False, waiting: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold an output, by a lock file beside it or in it; a thread that holds it already may claim it again.

    Args:
        output: a file or a folder. Of a link, what is behind it.
        inside: the output is a folder that is filled in place, and made here if need be. One that is still empty at the end
            goes again.
        waiting: wait for another run, and say so by this; without it, another run is an error.

    Raises:
        UsageError: naming who holds it, or if nothing can be written there.
    """
    place = Path(os.path.realpath(output))
    if not place.name or place.is_symlink():
        what = "a link that leads round in a circle" if place.is_symlink() else "the root of the disk"
        raise UsageError(f"{output}: {what}; choose another output")
    owner = place, threading.get_ident()
    if owner in _claims:
        yield
        return
    lock = place / LOCK if inside else place.with_name(f".{place.name}{LOCK}")
    made = _make_folders(place) if inside else []
    try:
        handle = _acquire(output, lock, waiting, made if inside else None)
        _claims.add(owner)
        _begun[lock] = os.getpid()
        try:
            yield
        finally:
            with suppress(OSError):
                lock.unlink()
            os.close(handle)
            _begun.pop(lock, None)
            _claims.discard(owner)
    finally:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()


def _make_folders(place: Path) -> list[Path]:
    """Make a folder and those above it; the new ones, innermost first."""
    made = [folder for folder in (place, *place.parents) if not folder.exists()]
    try:
        place.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise UsageError(f"{place}: is a file; the output is a folder") from error
    except OSError as error:
        raise UsageError(f"{place}: cannot be made ({error.strerror}); choose another output") from error
    return made


def _acquire(output: Path, lock: Path, waiting: Callable[[str], None] | None, made: list[Path] | None) -> int:
    """An open lock file that this run holds.

    A holder removes its lock file at the end, and a folder that it made and left empty. Whoever opened the file before holds
    one without a name, and tries again.

    Args:
        made: takes the folders that have to be made again; None where the lock file lies beside the output.
    """
    announced = False
    while True:
        try:
            handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK | _NO_LINK, 0o666)
        except OSError as error:
            if made is not None and isinstance(error, FileNotFoundError):
                made += _make_folders(lock.parent)
                continue
            raise UsageError(f"{lock.parent}: not writable ({error.strerror}); choose another output") from error
        free = try_lock(handle)
        if free is None:
            free = not _alive_there(_holder(handle))
        if free and is_named(handle, lock):
            with suppress(OSError):  # a full disk: the lock holds without a name on it
                _sign(handle)
            return handle
        holder = _holder(handle)
        os.close(handle)
        if free:
            continue
        if waiting is None:
            raise UsageError(
                f"{output}: another run (process {holder['process']}) is making it, on {holder['host']} since "
                f"{holder['since']}; wait for it or choose another output"
            )
        if not announced:
            waiting(
                f"{output}: waits for process {holder['process']} on {holder['host']}, at it since {holder['since']}"
            )
            announced = True
        time.sleep(POLL_SECONDS)


def _sign(handle: int) -> None:
    record = {"process": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
    os.ftruncate(handle, 0)
    os.pwrite(handle, json.dumps(record).encode(), 0)


def _holder(handle: int) -> dict[str, str]:
    """What a lock file says of its holder; question marks where it says nothing."""
    try:
        record = json.loads(os.pread(handle, 4096, 0))
        return {key: printable(str(record[key]))[:100] for key in ("process", "host", "since")}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return dict.fromkeys(("process", "host", "since"), "?")


def _alive_there(holder: dict[str, str]) -> bool:
    return holder["host"] == socket.gethostname() and holder["process"].isdecimal() and is_alive(int(holder["process"]))


def is_named(handle: int, path: Path) -> bool:
    """Whether a path still leads to an open file or folder."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except OSError:
        return False


# -- files and folders in the making ----------------------------------------------------------------------------------


@contextmanager
def claimed(place: Path) -> Iterator[Path]:
    """A new folder beside ``place``, held by this run; what is left of it at the end goes."""
    building, handle = _claim(place)
    try:
        yield building
    finally:
        remove(building)
        os.close(handle)
        _begun.pop(building, None)


def in_the_making(path: Path) -> bool:
    """Whether a path lies in a folder that this run has claimed and not finished."""
    return any(parent in _begun for parent in path.parents)


@contextmanager
def claimed_file(place: Path) -> Iterator[IO[bytes]]:
    """A new file beside ``place``, open for writing and held by this run; if it keeps its name until the end, it goes."""
    while True:
        temporary = temporary_name(place)
        file = temporary.open("xb")
        _begun[temporary] = os.getpid()
        # Between the two lines another run may have taken the new file for a dead one's.
        if try_lock(file.fileno()) is not False and is_named(file.fileno(), temporary):
            break
        file.close()
        _begun.pop(temporary, None)
    try:
        with file:
            yield file
    finally:
        with suppress(OSError):
            temporary.unlink()
        _begun.pop(temporary, None)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold an existing folder, if nobody else does; goes on in any case."""
    handle = open_to_lock(folder)
    try:
        try_lock(handle)
        yield
    finally:
        os.close(handle)


def remove(path: Path) -> OSError | None:
    """Remove a file or a folder, as far as that goes; the first reason why not, or None."""
    reasons: list[OSError] = []
    if path.is_symlink() or not path.is_dir():
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            return error
        return None
    shutil.rmtree(path, onerror=lambda function, name, info: reasons.append(info[1]))  # type: ignore[arg-type]
    return next((each for each in reasons if not isinstance(each, FileNotFoundError)), None)


def remove_begun() -> None:
    """Remove all that this process has begun: for an end without unwinding."""
    for path, process in list(_begun.items()):
        if process == os.getpid():
            remove(path)


# -- locks of the kernel ----------------------------------------------------------------------------------------------

_NO_LINK = getattr(os, "O_NOFOLLOW", 0)


def _claim(place: Path) -> tuple[Path, int]:
    while True:
        building = temporary_name(place)
        building.mkdir()
        _begun[building] = os.getpid()
        handle = open_to_lock(building)
        # Between the two lines another run may have taken the new folder for a dead one's.
        if try_lock(handle) is not False and building.exists():
            return building, handle
        os.close(handle)
        _begun.pop(building, None)


def temporary_name(place: Path) -> Path:
    return place.with_name(f".{place.name}.{os.getpid()}-{secrets.token_hex(4)}{SUFFIX}")


def open_to_lock(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | _NO_LINK)


def try_lock(handle: int) -> bool | None:
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


def is_alive(process: int) -> bool:
    """Whether another process of this number runs; in containers, a run that was killed often had this one's own."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
