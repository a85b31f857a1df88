"""What training needs of its data and can be had once: tensors by content, and facts about files.

A cache may be deleted at any time, shared between runs, and copied: it is filled again where it has gaps. Whatever
tells other contents apart goes into the key or the fingerprint, so nothing in it is ever out of date.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path

from torch import Tensor

from liftkit.checkpoint.files import reason, write_safetensors, write_text
from liftkit.checkpoint.header import Header, read_header
from liftkit.checkpoint.leftovers import sweep_inside
from liftkit.checkpoint.lock import claim
from liftkit.checkpoint.rewrite import read_tensor
from liftkit.errors import LiftkitError, UsageError

SHARD_BYTES = 64 * 1024 * 1024
SHARD_SECONDS = 30.0
KEPT_BYTES = 256 * 1024 * 1024
LAYOUT = "liftkit-cache/1"
FACTS_LAYOUT = "liftkit-facts/2"


@contextmanager
def held_cache(folder: Path, note: Callable[[str], None]) -> Iterator[None]:
    """Hold a cache while it is filled: a second run waits, and then finds what the first has made.

    A folder that cannot be written to is read without a lock.

    Args:
        folder: of the cache; made if need be.
        note: called with a line when this run has to wait.

    Raises:
        UsageError: if it cannot be made.
    """
    if folder.is_dir() and not os.access(folder, os.W_OK):
        yield
        return
    with claim(folder, inside=True, waiting=note):
        sweep_inside(folder)
        yield


class TensorCache:
    """Tensors on disk by key, in safetensors shards that are only ever added.

    Shards appear whole, so that a killed run loses at most what it gathered in :data:`SHARD_SECONDS`. Their headers are
    checked on opening: a shard that is damaged is removed and its keys are missing again. Tensors are read one by
    one from their places in the files, and the first :data:`KEPT_BYTES` of them stay in memory: an epoch comes to all of
    them once, and to forget the oldest for the newest would be to have none in memory that is asked for.

    Args:
        folder: may be shared by caches of other fingerprints.
        fingerprint: of what made the tensors, such as a VAE's.

    Attributes:
        damaged: names of shards that were removed.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.fingerprint = f"{LAYOUT} {fingerprint}"
        self.folder = folder / hashlib.sha256(self.fingerprint.encode()).hexdigest()[:16]
        self.damaged: list[str] = []
        self._where: dict[str, tuple[Header, list[str]]] = {}
        self._pending: dict[str, dict[str, Tensor]] = {}
        self._kept: dict[str, dict[str, Tensor]] = {}
        self._bytes = self._kept_bytes = 0
        self._flushed = time.monotonic()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"{self.folder}: no cache can be made there ({reason(error)})") from error
        for path in sorted(self.folder.glob("*.safetensors")):
            self._open(path)

    def __contains__(self, key: str) -> bool:
        return key in self._where or key in self._pending

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Those of the keys that are not here, each once and in their order."""
        return [key for key in dict.fromkeys(keys) if key not in self]

    def add(self, entries: dict[str, dict[str, Tensor]]) -> None:
        """Keep named tensors for keys; they are written when there is enough for a shard, or by :meth:`flush`."""
        for key, tensors in entries.items():
            # Clones: a row of a batch would keep the whole batch in memory.
            self._pending[key] = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
            self._bytes += sum(tensor.nbytes for tensor in tensors.values())
        if self._bytes >= SHARD_BYTES or time.monotonic() - self._flushed >= SHARD_SECONDS:
            self.flush()

    def get(self, key: str) -> dict[str, Tensor]:
        """The tensors of a key, on the CPU.

        Raises:
            KeyError: if there are none.
            LiftkitError: if their shard went away since it was opened.
        """
        if key in self._pending:
            return dict(self._pending[key])
        if key in self._kept:
            return dict(self._kept[key])
        header, names = self._where[key]
        try:
            found = {name: read_tensor(header, f"{key}:{name}") for name in names}
        except (OSError, ValueError, RuntimeError) as error:
            raise LiftkitError(
                f"{header.path}: this part of the cache was changed or removed while in use ({reason(error)}); "
                "run again, and it is rebuilt"
            ) from error
        if self._kept_bytes < KEPT_BYTES:
            self._kept[key] = found
            self._kept_bytes += sum(tensor.nbytes for tensor in found.values())
        return dict(found)

    def lengths(self, key: str) -> dict[str, int]:
        """The first dimensions of the tensors of a key, by name; they have to be on disk."""
        header, names = self._where[key]
        return {name: next(iter(header.tensors[f"{key}:{name}"].shape), 0) for name in names}

    def flush(self) -> None:
        """Write what :meth:`add` gathered.

        Raises:
            LiftkitError: if the disk refuses.
        """
        self._flushed = time.monotonic()
        if not self._pending:
            return
        # A name that nobody else takes: two processes that fill one cache at once never replace what the other has open.
        path = self.folder / f"{uuid.uuid4().hex}.safetensors"
        tensors = {f"{key}:{name}": tensor for key, entry in self._pending.items() for name, tensor in entry.items()}
        write_safetensors(path, tensors, {"format": "pt", "fingerprint": self.fingerprint})
        self._pending, self._bytes = {}, 0
        self._open(path)

    def _open(self, path: Path) -> None:
        try:
            header = read_header(path)
        except UsageError:
            header = None
        if header is None or header.metadata.get("fingerprint") != self.fingerprint:
            self.damaged.append(path.name)
            path.unlink(missing_ok=True)
            return
        for entry in header.tensors:
            key, _, name = entry.rpartition(":")
            known = self._where.get(key)
            if known is None or known[0] is not header:
                self._where[key] = known = (header, [])
            known[1].append(name)


@dataclass(frozen=True)
class Facts:
    """What is known of a picture without opening it.

    Args:
        key: its content's identity.
        height, width: in pixels, upright.
        decoded: whether it was decoded once without a fault.
        remark: what people may want to know of how it is read.
    """

    key: str
    height: int
    width: int
    decoded: bool = False
    remark: str = ""


class FactsTable:
    """Facts by stamp (see :meth:`CaptionedSource.stamp`), in one JSON file, so that files are hashed once.

    Args:
        path: the file; where it is missing or broken the table is empty.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._changed = False
        self._facts: dict[str, Facts] = {}
        try:
            content = json.loads(path.read_text())
            if content["layout"] == FACTS_LAYOUT:
                self._facts = {stamp: Facts(*facts) for stamp, facts in content["files"].items()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            pass

    def get(self, stamp: str) -> Facts | None:
        """What is known, or None."""
        return self._facts.get(stamp)

    def put(self, stamp: str, facts: Facts) -> None:
        """Remember; see :meth:`save`."""
        self._changed |= self._facts.get(stamp) != facts
        self._facts[stamp] = facts

    def save(self) -> None:
        """Write the table, if it changed.

        Raises:
            LiftkitError: if the disk refuses.
        """
        if self._changed:
            content = {"layout": FACTS_LAYOUT, "files": {stamp: astuple(facts) for stamp, facts in self._facts.items()}}
            write_text(self.path, json.dumps(content))
            self._changed = False
