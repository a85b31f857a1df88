"""Files read back beside their writing: digests for the manifest, and bytes compared with where they came from.

While one thread writes (mostly the kernel's own copying), another follows it, a little behind, and reads from the page
cache what arrived: it takes the SHA-256 of the file, adds up each tensor's bytes and compares them with the source's. A
third has the disk begin early, so that the last sync has little left to do. Hashing and system calls run beside each other
in Python threads.

A tensor's sum is that of its bytes as little-endian 64-bit words, modulo 2^64: any single flipped bit changes it, and it
costs a tenth of a digest. It tells *where* a file was spoiled; *that* it was is what the SHA-256 tells.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Condition
from types import TracebackType

import numpy as np

from liftkit.checkpoint.header import Header, read_header
from liftkit.checkpoint.source import Stamp, open_regular, read_exactly
from liftkit.errors import ProofError, UsageError

BLOCK = 512 * 1024
SYNC_EVERY = 64 * 1024 * 1024


@dataclass(frozen=True)
class Part:
    """One tensor of a file that is being written.

    Args:
        name: of the tensor; empty for a file of another kind.
        start: offset in the file.
        end: offset behind it.
        origin: offset in the source file of the bytes that it should have, or None where it is made anew.
        cast: makes bytes of the file from bytes of the source, where they are not the same.
        ratio: bytes of the source for one of the file, where they are cast.
    """

    name: str
    start: int
    end: int
    origin: int | None = None
    cast: Callable[[memoryview], bytes] | None = None
    ratio: float = 1.0


@dataclass(frozen=True)
class Digest:
    """What identifies a file: its SHA-256 and, of a safetensors file, each tensor's sum, both hexadecimal."""

    sha256: str
    tensors: dict[str, str] = field(default_factory=dict)


class Follower:
    """Reads a file back while it is written.

    Args:
        path: of the file; ``under`` is the name that it has now, where that is another.
        size: that it will have.
        parts: its tensors.
        source: the file that their bytes come from, and its stamp.
        sync: have the disk begin early.
        read: told the bytes hashed, from another thread.
    """

    def __init__(
        self,
        path: Path,
        size: int,
        parts: Sequence[Part] = (),
        source: tuple[Path, Stamp | None] | None = None,
        *,
        under: Path | None = None,
        sync: bool = False,
        read: Callable[[int], None] = lambda count: None,
    ) -> None:
        self.path, self.size, self.parts, self.source, self.read = path, size, parts, source, read
        self._position, self._stopped, self._moved = 0, False, Condition()
        self._handle = os.open(under or path, os.O_RDONLY | os.O_CLOEXEC)
        self._pool = ThreadPoolExecutor(max_workers=2)
        self._digest = self._pool.submit(self._read_back)
        self._synced = self._pool.submit(self._sync) if sync else None

    def advance(self, position: int) -> None:
        """The writer has come this far."""
        with self._moved:
            self._position = position
            self._moved.notify_all()

    def stop(self) -> None:
        """The writer failed: give up, and wait until all threads have."""
        with self._moved:
            self._stopped = True
            self._moved.notify_all()
        self._pool.shutdown()
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def result(self) -> Digest:
        """Wait for the end.

        Raises:
            ProofError: if bytes are not the source's.
            LiftkitError: if the source changed.
            OSError: if the disk failed.
        """
        try:
            found = self._digest.result()
            if self._synced is not None:
                self._synced.result()
        finally:
            self.stop()
        return found

    def _wait(self, position: int) -> None:
        with self._moved:
            self._moved.wait_for(lambda: self._stopped or self._position >= position)
            if self._stopped:
                raise InterruptedError

    def _read_back(self) -> Digest:
        if self.source is None:
            return self._digest_of(None)
        with open_regular(*self.source) as source:
            return self._digest_of(source.fileno())

    def _digest_of(self, source: int | None) -> Digest:
        digest, sums = hashlib.sha256(), {}
        buffers = memoryview(bytearray(BLOCK)), memoryview(bytearray(BLOCK))
        lead = Part("", 0, self.parts[0].start if self.parts else self.size)
        for part in (lead, *self.parts):
            total, at = 0, part.start
            # Whole words, whose bytes in the source fit into the other buffer.
            step = int(BLOCK / max(1, part.ratio)) // 8 * 8
            while at < part.end:
                block = buffers[0][: min(step, part.end - at)]
                self._wait(at + len(block))
                read_exactly(self._handle, at, block, self.path)
                digest.update(block)
                total += _sum(block)
                if source is not None and part.origin is not None:
                    self._compare(block, buffers[1], part, at - part.start, source)
                at += len(block)
                self.read(len(block))
            if part.name:
                sums[part.name] = f"{total % 2**64:016x}"
        return Digest(digest.hexdigest(), sums)

    def _compare(self, block: memoryview, buffer: memoryview, part: Part, at: int, source: int) -> None:
        assert part.origin is not None
        assert self.source is not None
        original = buffer[: round(len(block) * part.ratio)]
        read_exactly(source, part.origin + round(at * part.ratio), original, self.source[0])
        if not _same(block, part.cast(original) if part.cast else original):
            raise ProofError(
                f"{self.path}: tensor {part.name!r} is not what {self.source[0]} holds, near its byte {at}; "
                "check disk and memory, and run again"
            )

    def _sync(self) -> None:
        sync = getattr(os, "fdatasync", os.fsync)
        for at in range(SYNC_EVERY, self.size + SYNC_EVERY, SYNC_EVERY):
            self._wait(min(at, self.size))
            sync(self._handle)


class Ledger:
    """Digests of a folder in the making, taken beside the writing; use as a context.

    Args:
        folder: in the making.
        most: files that are followed at once, each with two threads and a megabyte.
    """

    def __init__(self, folder: Path, most: int = 3) -> None:
        self.folder, self.most = folder, most
        self._running: dict[str, Follower] = {}
        self._done: dict[str, Digest] = {}

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for follower in self._running.values():
            follower.stop()

    def add(self, path: Path, follower: Follower) -> None:
        """Take over the follower of a file below the folder, by the name that the file will have."""
        self._running[path.relative_to(self.folder).as_posix()] = follower
        while len(self._running) > self.most:
            self._finish(next(iter(self._running)))

    def digests(self) -> Mapping[str, Digest]:
        """Wait for all; see :meth:`Follower.result`."""
        for name in list(self._running):
            self._finish(name)
        return self._done

    def _finish(self, name: str) -> None:
        self._done[name] = self._running[name].result()
        del self._running[name]


def parts_of(header: Header, origins: Mapping[str, int] | None = None) -> list[Part]:
    """The tensors of a file, in the order of their bytes.

    Args:
        header: of the file.
        origins: where in the source file their bytes are, by name.
    """
    entries = sorted(header.tensors.items(), key=lambda item: item[1].start)
    base, origins = header.payload, origins or {}
    return [Part(name, base + entry.start, base + entry.end, origins.get(name)) for name, entry in entries]


def digest_file(path: Path, progress: Callable[[int], None] = lambda count: None) -> Digest:
    """What identifies a file that is there: its SHA-256 and, if it is a whole safetensors file, its tensors' sums."""
    parts: list[Part] = []
    if path.suffix == ".safetensors":
        # Of one that is none after all, the SHA-256 will do.
        with suppress(UsageError):
            parts = parts_of(read_header(path))
    size = path.stat().st_size
    follower = Follower(path, size, parts, read=progress)
    follower.advance(size)
    return follower.result()


def _same(found: memoryview, wanted: memoryview | bytes) -> bool:
    kind = np.uint64 if len(found) % 8 == 0 else np.uint8
    return np.array_equal(np.frombuffer(found, kind), np.frombuffer(wanted, kind))


def _sum(block: memoryview) -> int:
    whole = len(block) - len(block) % 8
    return int(np.frombuffer(block[:whole], "<u8").sum(dtype=np.uint64)) + int.from_bytes(block[whole:], "little")
