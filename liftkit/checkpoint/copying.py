"""Files copied by the kernel: whole, linked, or some tensors of them; with digests taken beside the writing where asked."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from liftkit.checkpoint.direct import PAGE, copy_direct
from liftkit.checkpoint.files import atomic_file
from liftkit.checkpoint.follow import Follower, Ledger
from liftkit.checkpoint.header import Header, encode_header, laid_out
from liftkit.checkpoint.parts import Part, parts_of
from liftkit.checkpoint.source import Stamp, open_regular, stamp_of
from liftkit.errors import LiftkitError

CHUNK = 16 * 1024 * 1024


def copy_file(
    source: Path,
    target: Path,
    *,
    stamp: Stamp | None = None,
    header: Header | None = None,
    progress: Callable[[int], None] = lambda written: None,
    ledger: Ledger | None = None,
) -> None:
    """Copy a file whole, in the kernel where it can; ``header`` is its own if it is a safetensors file.

    Raises:
        LiftkitError: if it is not the file of the stamp, or the disk refuses.
    """
    with open_regular(source, stamp) as file:
        stamp = stamp_of(file)
    origins = {name: header.payload + entry.start for name, entry in header.tensors.items()} if header else {}
    parts = parts_of(header, origins) if header else [Part("", 0, stamp.size, 0)]
    with writing(source, stamp, target, stamp.size, parts, ledger) as (original, written, reached):
        copy_range(original, 0, stamp.size, written, 0, fan_out(progress, reached))


def link_file(source: Path, target: Path, header: Header | None = None, ledger: Ledger | None = None) -> bool:
    """Give a file a second name, where the file system and its rules allow that; whether they did."""
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        return False
    if ledger is not None:
        size = target.stat().st_size
        follower = Follower(target, size, parts_of(header) if header else ())
        follower.advance(size)
        ledger.add(target, follower)
    return True


def extract_file(tensors: dict[str, Header], target: Path) -> None:
    """Write some tensors of one or several files into a new one, copied in the kernel where it can.

    Args:
        tensors: the file of each tensor, by name.
        target: the new file; appears whole or not at all.

    Raises:
        LiftkitError: if a source changed since its header was read, or the disk refuses.
    """
    entries = laid_out(
        {name: (header.tensors[name].dtype, header.tensors[name].shape) for name, header in tensors.items()}
    )
    lead = encode_header(entries, {"format": "pt"})
    with atomic_file(target) as file:
        write_at(file, 0, lead)
        for name, entry in entries.items():
            header = tensors[name]
            start = header.payload + header.tensors[name].start
            with open_regular(header.path, header.stamp) as source:
                copy_range(source, start, entry.size, file, len(lead) + entry.start, lambda count, at: None)


def copy_range(
    source: IO[bytes], offset: int, size: int, target: IO[bytes], position: int, progress: Callable[[int, int], None]
) -> None:
    """Copy bytes between files: many of them past the page cache where that can be, others in the kernel or through a buffer.

    Args:
        source: open for reading.
        offset: in it.
        size: bytes.
        target: open for writing.
        position: in it.
        progress: called with the bytes copied and the position reached, piece by piece.

    Raises:
        LiftkitError: if the source ends before.
    """
    lead = min(size, -position % PAGE)
    _copy_cached(source, offset, lead, target, position, progress)
    done = lead + copy_direct(source, offset + lead, size - lead, target, position + lead, progress)
    _copy_cached(source, offset + done, size - done, target, position + done, progress)


def _copy_cached(
    source: IO[bytes], offset: int, size: int, target: IO[bytes], position: int, progress: Callable[[int, int], None]
) -> None:
    """:func:`copy_range` through the page cache."""
    while size > 0:
        count = min(size, CHUNK)
        try:
            copied = os.copy_file_range(source.fileno(), target.fileno(), count, offset, position)
        except (OSError, AttributeError):
            copied = os.pwrite(target.fileno(), os.pread(source.fileno(), count, offset), position)
        if copied == 0:
            raise LiftkitError(f"{source.name}: became shorter while it was read; run again")
        offset, position, size = offset + copied, position + copied, size - copied
        progress(copied, position)


@contextmanager
def writing(
    source: Path, stamp: Stamp | None, target: Path, size: int, parts: list[Part], ledger: Ledger | None
) -> Iterator[tuple[IO[bytes], IO[bytes], Callable[[int], None]]]:
    """The source, a new file, and what is called with how far that is written."""
    with open_regular(source, stamp) as original, atomic_file(target) as file:
        follower = None
        if ledger is not None:
            follower = Follower(target, size, parts, (source, stamp), under=Path(str(file.name)), sync=True)
            ledger.add(target, follower)
        yield original, file, follower.advance if follower else lambda position: None
        if stamp is not None:
            with open_regular(source, stamp):
                pass


def write_at(file: IO[bytes], at: int, raw: bytes | memoryview) -> None:
    """Write all bytes to a place in an open file."""
    rest = memoryview(raw)
    while rest:
        count = os.pwrite(file.fileno(), rest, at)
        rest, at = rest[count:], at + count


def fan_out(progress: Callable[[int], None], follow: Callable[[int], None]) -> Callable[[int, int], None]:
    """One callback for :func:`copy_range` from two: the first takes the count of bytes, the second the position."""

    def forward(count: int, position: int) -> None:
        progress(count)
        follow(position)

    return forward
