"""Digests for the manifest, taken beside the writing.

While one thread writes (mostly the kernel's own copying), another takes the digest of the file and adds up each tensor's
bytes. What is copied it reads from the source, not from the copy: so the manifest says what ought to be there, and whatever
goes wrong behind that, in memory, kernel or disk, ``liftkit verify`` finds. What is made anew it reads from the file. Both
ends of every copied tensor are compared with the source's, which shows a tensor in a wrong place at once. A third thread
has the disk begin early, so that the last sync has little left to do. Hashing and system calls run beside each other in
Python threads.

A tensor's sum is that of its bytes as little-endian 64-bit words, modulo 2^64: any single flipped bit changes it, and it
costs a fifth of a digest. It tells *where* a file was spoiled; *that* it was is what the digest tells.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Condition, Lock
from types import TracebackType

from liftkit.checkpoint.hashing import CHOSEN, new_hash, word
from liftkit.checkpoint.header import read_header
from liftkit.checkpoint.parts import BLOCK, Part, compare_block, is_finite, parts_of, read_original, word_sum
from liftkit.checkpoint.source import Stamp, open_regular, read_exactly
from liftkit.errors import UsageError

EDGE = 4096
MOST_HASHING = 8


@dataclass(frozen=True)
class Digest:
    """What identifies a file: its digest, a word of :mod:`liftkit.checkpoint.hashing`, and, of a safetensors file, each
    tensor's sum, hexadecimal; and which of its tensors hold NaN or infinite numbers."""

    value: str
    tensors: dict[str, str] = field(default_factory=dict)
    not_finite: tuple[str, ...] = ()


class Follower:
    """Takes the digest of a file while it is written.

    Args:
        path: of the file; ``under`` is the name that it has now, where that is another.
        size: that it will have.
        parts: its tensors.
        source: the file that their bytes come from, and its stamp.
        sync: whether the disk is to begin early; see :meth:`sync`.
        read: called with the number of bytes hashed.
        algorithm: of the digest.
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
        algorithm: str = CHOSEN,
    ) -> None:
        self.algorithm = algorithm
        self.path, self.size, self.parts, self.source, self.read = path, size, parts, source, read
        self.synced = sync
        self._position, self._stopped, self._moved = 0, False, Condition()
        self._handle = os.open(under or path, os.O_RDONLY | os.O_CLOEXEC)

    def advance(self, position: int) -> None:
        """The writer has come this far."""
        with self._moved:
            self._position = position
            self._moved.notify_all()

    def stop(self) -> None:
        """The writer failed: whoever takes the digest or syncs gives up, with InterruptedError."""
        with self._moved:
            self._stopped = True
            self._moved.notify_all()

    def close(self) -> None:
        """Let go of the file, once nobody reads or syncs it any more."""
        os.close(self._handle)

    def digest(self) -> Digest:
        """Read up to the end, waiting for the writer where need be.

        Raises:
            ProofError: if an end of a copied tensor is not the source's.
            LiftkitError: if the source changed.
            OSError: if the disk failed.
        """
        if self.source is None:
            return self._digest_of(None)
        with open_regular(*self.source) as source:
            found = self._digest_of(source.fileno())
            self._wait(self.size)
            for part in self.parts:
                self._compare_ends(part, source.fileno())
        return found

    def sync(self) -> None:
        """Have the disk write the file as soon as it is there: earlier would hold up the writer."""
        self._wait(self.size)
        getattr(os, "fdatasync", os.fsync)(self._handle)

    def _wait(self, position: int) -> None:
        with self._moved:
            self._moved.wait_for(lambda: self._stopped or self._position >= position)
            if self._stopped:
                raise InterruptedError

    def _digest_of(self, source: int | None) -> Digest:
        digest, sums, not_finite = new_hash(self.algorithm), {}, {}
        buffer = memoryview(bytearray(BLOCK))
        lead = Part("", 0, self.parts[0].start if self.parts else self.size)
        for part in (lead, *self.parts):
            total, at = 0, part.start
            while at < part.end:
                block = self._block(part, at, min(part.step, part.end - at), buffer, source)
                digest.update(block)
                total += word_sum(block)
                if not is_finite(block, part.dtype):
                    not_finite[part.name] = True
                at += len(block)
                self.read(len(block))
            if part.name:
                sums[part.name] = f"{total % 2**64:016x}"
        return Digest(word(self.algorithm, digest.hexdigest()), sums, tuple(not_finite))

    def _block(self, part: Part, at: int, count: int, buffer: memoryview, source: int | None) -> memoryview:
        """Bytes of the file at a place: from the source where they are copied, else from the file itself."""
        if self._stopped:
            raise InterruptedError
        if self.source is not None and source is not None and part.origin is not None:
            return read_original(part, at, count, buffer, source, self.source[0])
        self._wait(at + count)
        read_exactly(self._handle, at, buffer[:count], self.path)
        return buffer[:count]

    def _compare_ends(self, part: Part, source: int) -> None:
        assert self.source is not None
        if part.origin is not None and part.end > part.start:
            for at in {part.start, max(part.start, part.end - EDGE)}:
                count = min(EDGE, part.end - at)
                compare_block(part, at, count, (self._handle, self.path), (source, self.source[0]))


class Ledger:
    """Digests of a folder in the making, taken beside the writing; use as a context.

    One processor is left to the writing, and to the proof and the report behind it; what is not hashed when those are
    done, the caller's own thread takes part in.

    Args:
        folder: in the making.
        most: files that are open at once for hashing.
    """

    def __init__(self, folder: Path, most: int = 64) -> None:
        self.folder, self.most = folder, most
        self._hashing = ThreadPoolExecutor(max_workers=min(MOST_HASHING, max(1, _processors() - 1)))
        self._syncing = ThreadPoolExecutor(max_workers=1)
        self._running: dict[str, _Entry] = {}
        self._done: dict[str, Digest] = {}

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for entry in self._running.values():
            entry.follower.stop()
        for pool in (self._hashing, self._syncing):
            pool.shutdown(cancel_futures=True)
        for entry in self._running.values():
            entry.follower.close()

    def add(self, path: Path, follower: Follower) -> None:
        """Take over the follower of a file below the folder, by the name that the file will have."""
        synced = self._syncing.submit(follower.sync) if follower.synced else None
        entry = _Entry(follower, self._hashing.submit(follower.digest), synced)
        self._running[path.relative_to(self.folder).as_posix()] = entry
        if len(self._running) > self.most:
            first = next(iter(self._running))
            self._running[first].digest.cancel()
            self._finish(first)

    def digests(self) -> Mapping[str, Digest]:
        """Wait for all; see :meth:`Follower.digest`."""
        # The pool goes from the first on, this thread from the last back.
        for name in reversed(list(self._running)):
            if self._running[name].digest.cancel():
                self._finish(name)
        for name in list(self._running):
            self._finish(name)
        return self._done

    def _finish(self, name: str) -> None:
        entry = self._running[name]
        self._done[name] = entry.follower.digest() if entry.digest.cancelled() else entry.digest.result()
        if entry.synced is not None:
            entry.synced.result()
        entry.follower.close()
        del self._running[name]


@dataclass(frozen=True)
class _Entry:
    """A file that is followed, and what will come of it."""

    follower: Follower
    digest: Future[Digest]
    synced: Future[None] | None


def digest_file(path: Path, progress: Callable[[int], None] = lambda count: None, algorithm: str = CHOSEN) -> Digest:
    """What identifies a file that is there: its digest and, if it is a whole safetensors file, its tensors' sums."""
    parts: list[Part] = []
    if path.suffix == ".safetensors":
        # Of one that is none after all, the digest will do.
        with suppress(UsageError):
            parts = parts_of(read_header(path))
    size = path.stat().st_size
    follower = Follower(path, size, parts, read=progress, algorithm=algorithm)
    follower.advance(size)
    try:
        return follower.digest()
    finally:
        follower.close()


def digest_files(
    files: Mapping[str, tuple[Path, str]], progress: Callable[[int], None] = lambda count: None
) -> dict[str, Digest]:
    """:func:`digest_file` of many, by as many threads as there are processors.

    Args:
        files: each file and the hash to take, by a name.
        progress: called with the number of bytes read, by one thread after another.
    """
    turn = Lock()

    def read(count: int) -> None:
        with turn:
            progress(count)

    with ThreadPoolExecutor(max_workers=min(MOST_HASHING, _processors())) as pool:
        return dict(zip(files, pool.map(lambda each: digest_file(each[0], read, each[1]), files.values())))


def _processors() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
