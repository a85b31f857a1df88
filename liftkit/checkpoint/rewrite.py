"""Rewrite a few tensors of a safetensors file: all others are copied from file to file by the kernel."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

from liftkit.checkpoint.files import atomic_file
from liftkit.checkpoint.header import Header, TensorEntry, encode_header, tensor_bytes

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CHUNK = 16 * 1024 * 1024
_TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip


def read_tensor(header: Header, name: str) -> Tensor:
    """One tensor of a file, read alone."""
    import torch

    entry = header.tensors[name]
    with header.path.open("rb") as file:
        file.seek(header.payload + entry.start)
        raw = bytearray(file.read(entry.size))
    if not raw:
        return torch.empty(entry.shape, dtype=torch_dtype(entry.dtype))
    return torch.frombuffer(raw, dtype=torch_dtype(entry.dtype)).reshape(entry.shape)


def rewrite_file(
    source: Header,
    target: Path,
    changed: dict[str, Tensor],
    *,
    dtype: torch.dtype | None = None,
    progress: Callable[[int], None] = lambda written: None,
) -> None:
    """Write a copy of a safetensors file with some tensors changed or added.

    Args:
        source: the file's header.
        target: the new file; appears whole or not at all.
        changed: replaces the source's tensors of the same name; names that it does not have are added at the end.
        dtype: cast floating tensors of the source to this; None keeps their bytes.
        progress: told the bytes written, piece by piece.
    """
    entries = _plan(source, changed, dtype)
    with source.path.open("rb") as original, atomic_file(target) as file:
        file.write(encode_header(entries, source.metadata or {"format": "pt"}))
        for piece in _pieces(source, entries, changed):
            if isinstance(piece, range):
                copy_range(original, source.payload + piece.start, len(piece), file, progress)
            else:
                tensor = changed[piece] if piece in changed else read_tensor(source, piece).to(dtype)
                _write_tensor(file, tensor)
                progress(entries[piece].size)


def rewritten_size(source: Header, changed: dict[str, TensorEntry], dtype: str | None) -> int:
    """Bytes of the tensors that :func:`rewrite_file` would write (its header aside)."""
    kept = {name: entry for name, entry in source.tensors.items() if name not in changed}
    total = sum(entry.size for entry in changed.values())
    return total + sum(tensor_bytes(_cast(entry.dtype, dtype), entry.shape) for entry in kept.values())


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a safetensors dtype name.

    Raises:
        UsageError: if torch here has no such dtype.
    """
    import torch

    from liftkit.errors import UsageError

    if name not in _TORCH_NAMES:
        raise UsageError(f"tensors of dtype {name} are not supported; convert the full-precision checkpoint")
    return getattr(torch, _TORCH_NAMES[name])


def dtype_name(dtype: torch.dtype) -> str:
    """The safetensors name of a torch dtype."""
    return {value: key for key, value in _TORCH_NAMES.items()}[str(dtype).removeprefix("torch.")]


def _cast(name: str, wanted: str | None) -> str:
    return wanted if wanted is not None and name in ("F64", "F32", "F16", "BF16") else name


def _plan(source: Header, changed: dict[str, Tensor], dtype: torch.dtype | None) -> dict[str, TensorEntry]:
    """The new file's entries: the source's order of bytes, then what is added."""
    wanted = None if dtype is None else dtype_name(dtype)
    names = sorted(source.tensors, key=lambda name: source.tensors[name].start)
    entries, position = {}, 0
    for name in [*names, *(name for name in changed if name not in source.tensors)]:
        if name in changed:
            kind, shape = dtype_name(changed[name].dtype), tuple(changed[name].shape)
        else:
            kind, shape = _cast(source.tensors[name].dtype, wanted), source.tensors[name].shape
        size = tensor_bytes(kind, shape)
        entries[name] = TensorEntry(kind, shape, position, position + size)
        position += size
    return entries


def _pieces(source: Header, entries: dict[str, TensorEntry], changed: dict[str, Tensor]) -> Iterator[range | str]:
    """What the payload is made of: byte ranges of the source's payload that stay, and names that are written anew."""
    run: range | None = None
    for name, entry in entries.items():
        old = source.tensors.get(name)
        if name not in changed and old is not None and entry.dtype == old.dtype:
            # Neighbours that stay go in one piece.
            run = range(run.start if run else old.start, old.end)
            continue
        if run:
            yield run
        run = None
        yield name
    if run:
        yield run


def copy_range(source: IO[bytes], offset: int, size: int, target: IO[bytes], progress: Callable[[int], None]) -> None:
    """Copy bytes between files in the kernel where it can, else through a buffer."""
    target.flush()
    position = target.tell()
    while size > 0:
        count = min(size, CHUNK)
        try:
            copied = os.copy_file_range(source.fileno(), target.fileno(), count, offset, position)
        except (OSError, AttributeError):
            source.seek(offset)
            copied = os.pwrite(target.fileno(), source.read(count), position)
        if copied == 0:
            raise OSError(5, "the source file became shorter while it was read")
        offset, position, size = offset + copied, position + copied, size - copied
        progress(copied)
    target.seek(position)


def _write_tensor(file: IO[bytes], tensor: Tensor) -> None:
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    file.write(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
