"""Small safetensors files, whole, and files that appear at once: temporary sibling, fsync, rename."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

from liftkit.checkpoint.header import encode_header, laid_out, read_header
from liftkit.checkpoint.leftovers import sweep
from liftkit.checkpoint.lock import claim, claimed_file, in_the_making
from liftkit.errors import LiftkitError, UsageError

if TYPE_CHECKING:
    from torch import Tensor


def expanded(path: str | Path) -> Path:
    """A path with the home folder in the place of ``~``. That of nobody's home stays as it is, and is then not there, where
    :meth:`pathlib.Path.expanduser` raises."""
    return Path(os.path.expanduser(path))


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary sibling for writing; it takes ``path``'s place when the block ends well, and goes otherwise.

    Where ``path`` is a link, the file behind it is replaced and the link stays. It waits until the disk has the file, but for one
    in a folder in the making: that is synced whole at its end, and each wait for a small file would be one for the large ones too.

    Raises:
        UsageError: if something other than a file is there, such as a device.
        LiftkitError: if the disk refuses.
    """
    place = Path(os.path.realpath(path))
    _check_replaceable(path, place)
    durable = not in_the_making(place)
    try:
        with claimed_file(place) as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
            os.replace(file.name, place)
        if durable:
            sync(place.parent)
    except OSError as error:
        raise LiftkitError(f"{path}: cannot be written ({reason(error)}); nothing was left behind") from error


def reason(error: Exception) -> str:
    """What an error says, on one line: the disk's own words, or a library's, which may take several lines."""
    return getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__


def sync(path: Path) -> None:
    """Wait until the disk has a file, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a text file, atomically."""
    with atomic_file(path) as file:
        file.write(text.encode())


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a small safetensors file, atomically, with its tensors aligned and with the umask's mode (safetensors' own
    writer aligns to 8 bytes and makes 0600).

    Tensors that share memory are copied: the format gives each its own bytes.
    """
    from safetensors.torch import save

    apart, seen = {}, set()
    for name, tensor in tensors.items():
        plain = tensor.detach().contiguous().cpu()
        memory = plain.untyped_storage().data_ptr()
        apart[name] = plain.clone() if memory in seen else plain
        seen.add(memory)
    content = memoryview(save(apart))
    payload = 8 + int.from_bytes(content[:8], "little")
    found = json.loads(bytes(content[8:payload]))
    entries = laid_out({name: (each["dtype"], tuple(each["shape"])) for name, each in found.items()})
    with atomic_file(path) as file:
        file.write(encode_header(entries, metadata or {}))
        for name in entries:
            start, end = (payload + offset for offset in found[name]["data_offsets"])
            file.write(content[start:end])


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the metadata of a small file.

    Raises:
        UsageError: if it is missing, truncated or no safetensors file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    header = read_header(path)
    try:
        return load_file(path), header.metadata
    except SafetensorError as error:
        raise UsageError(f"{path}: {error}") from error


@contextmanager
def output_file(path: Path | None, *endings: str) -> Iterator[None]:
    """Hold a file that is to be written at the end of the block; what killed runs left beside it goes.

    Args:
        path: of the file; None holds nothing.
        endings: that its name may have.

    Raises:
        UsageError: see :func:`check_file`; or another run is making it, or nothing can be written there.
    """
    if path is None:
        yield
        return
    check_file(path, *endings)
    with claim(path):
        sweep(Path(os.path.realpath(path)))
        yield


def check_file(path: Path | None, *endings: str) -> None:
    """Raise unless a file could be written there, as far as looking can say; see :func:`output_file`.

    Raises:
        UsageError: if it is a folder or a device, has another ending, or its folder is missing or not writable.
    """
    if path is None:
        return
    if path.suffix.lower() not in endings:
        raise UsageError(f"{path}: expected a name that ends in {' or '.join(endings)}")
    place = Path(os.path.realpath(path))
    if place.is_dir():
        raise UsageError(f"{path}: is a folder; give a file name")
    _check_replaceable(path, place)
    if not place.parent.is_dir():
        raise UsageError(f"{place.parent}: no such folder; make it first")
    if not os.access(place.parent, os.W_OK):
        raise UsageError(f"{place.parent}: not writable; choose another place")


def _check_replaceable(path: Path, place: Path) -> None:
    try:
        if place.exists() and not (place.is_file() or place.is_dir()):
            raise UsageError(f"{path}: is no regular file; choose another place")
        mounted = place.is_file() and os.path.ismount(place)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({reason(error)}); choose another place") from error
    if mounted:
        raise UsageError(f"{path}: is a mount point, which cannot be replaced; choose another place")
