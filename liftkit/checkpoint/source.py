"""What is read is not trusted: regular files, within the model's own folder, the same from the plan to the end."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from liftkit.errors import LiftkitError, UsageError

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


@dataclass(frozen=True)
class Stamp:
    """What tells that a file is still the one that was looked at: its device and inode, bytes, and nanoseconds of
    its last change."""

    device: int
    inode: int
    size: int
    modified: int


@contextmanager
def open_regular(path: Path, expected: Stamp | None = None) -> Iterator[IO[bytes]]:
    """Open a file for reading, unbuffered; a pipe or a device is refused, where opening it would hang.

    Args:
        path: of the file.
        expected: its stamp when it was looked at first.

    Raises:
        UsageError: if it is missing, cannot be read or is no regular file.
        LiftkitError: if it is no longer the file that was looked at.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise UsageError(f"{path}: cannot be read ({why}); check the path") from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise UsageError(f"{path}: no regular file; put the file itself there")
    # By an opener, which gives the file its name: os.fdopen would call it by its number.
    with open(path, "rb", buffering=0, opener=lambda *_: handle) as file:
        _compare(path, stamp_of(file), expected)
        yield file


def stamp_of(file: IO[bytes]) -> Stamp:
    """The stamp of an open file."""
    found = os.fstat(file.fileno())
    return Stamp(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def stamps(paths: Iterable[Path]) -> dict[Path, Stamp]:
    """The stamps of files.

    Raises:
        UsageError: if one cannot be read.
    """
    found = {}
    for path in paths:
        with open_regular(path) as file:
            found[path] = stamp_of(file)
    return found


def check_unchanged(expected: Mapping[Path, Stamp]) -> None:
    """Raise unless files are still the ones that were looked at.

    Raises:
        LiftkitError: naming the first that is not.
    """
    for path, stamp in expected.items():
        try:
            with open_regular(path, stamp):
                pass
        except UsageError as error:
            raise LiftkitError(f"{path}: went away while it was read; run again") from error


def read_exactly(handle: int, offset: int, buffer: memoryview, path: Path) -> None:
    """Fill a buffer from a place in an open file; ``path`` is what to call it.

    Raises:
        LiftkitError: if the file ends before.
    """
    done = 0
    while done < len(buffer):
        count = os.preadv(handle, [buffer[done:]], offset + done)
        if count == 0:
            raise LiftkitError(f"{path}: became shorter while it was read; run again")
        done += count


def list_files(folder: Path, home: Path | None = None) -> list[Path]:
    """Every file below a folder, in order of name; links are followed as long as they stay at home.

    Args:
        folder: where to look.
        home: where links may lead; anywhere if not given.

    Raises:
        UsageError: naming a link that leads out, nowhere or round in a circle, a file that is no regular one, or a
            name that does not print.
    """
    home = Path(os.path.realpath(home or "/"))
    check_at_home(folder, home)
    return list(_walk(folder, home, ()))


def check_at_home(path: Path, home: Path) -> None:
    """Raise unless a link leads to something below ``home``: what is copied must not come from elsewhere unseen.

    Raises:
        UsageError: if it does not.
    """
    target = Path(os.path.realpath(path))
    if path.is_symlink() and not target.is_relative_to(os.path.realpath(home)):
        raise UsageError(f"{path}: a link out of the model folder, to {target}; put the file itself there")


def _walk(folder: Path, home: Path, above: tuple[str, ...]) -> Iterator[Path]:
    real = os.path.realpath(folder)
    if real in above:
        raise UsageError(f"{folder}: a link that leads round in a circle; remove it")
    try:
        children = sorted(folder.iterdir())
    except OSError as error:
        raise UsageError(f"{folder}: cannot be read ({error.strerror}); check the path") from error
    for path in children:
        if not path.name.isprintable():
            raise UsageError(f"{folder}: the name {path.name!r} does not print; rename or remove it")
        try:
            mode = path.stat().st_mode
        except OSError as error:
            raise UsageError(f"{path}: leads nowhere ({error.strerror}); is the model folder complete?") from error
        check_at_home(path, home)
        if stat.S_ISDIR(mode):
            yield from _walk(path, home, (*above, real))
        elif stat.S_ISREG(mode):
            yield path
        else:
            raise UsageError(f"{path}: neither a file nor a folder; remove it")


def _compare(path: Path, found: Stamp, expected: Stamp | None) -> None:
    if expected is None or found == expected:
        return
    what = f"{expected.size} bytes then, {found.size} now" if found.size != expected.size else "another file or time"
    raise LiftkitError(f"{path}: changed since it was looked at first ({what}); run again when nobody writes to it")
