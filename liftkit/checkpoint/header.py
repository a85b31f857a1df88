"""The header of a safetensors file, parsed and distrusted. No torch.

A file is 8 bytes (little-endian length n), n bytes of JSON and the tensors' bytes. Everything about the
payload is checked against the file's real size before anything is read or allocated, and numbers before they are
multiplied.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from liftkit.checkpoint.source import Stamp, open_regular, stamp_of
from liftkit.errors import UsageError

MAX_HEADER = 16 * 1024 * 1024
"""Bytes; enough for a hundred thousand tensors, and little enough to be parsed without harm."""
MOST_DIMENSIONS, LARGEST = 64, 2**48
MOST_TENSORS, MOST_METADATA = 100_000, 8 * 1024 * 1024
"""Tensors of a file, and characters of its metadata; real files have some thousands of either."""
ALIGNMENT = 64
"""Bytes: of a cache line, and of the widest vector. Where a file is mapped into memory, matrix libraries take other kernels
for tensors that begin elsewhere, whose sums are rounded otherwise."""
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64,
    "C64": 64,
}  # fmt: skip
# Of the format, and narrower than a byte: no number of them can be addressed alone.
_PACKED = ("F4", "F6_E2M3", "F6_E3M2")
_MAGIC = {
    b"version ": "a git-lfs pointer, not the weights; run 'git lfs pull' in the model folder",
    b"GGUF": "a quantized file in GGUF format, which liftkit does not read; give the full-precision .safetensors file",
    b"PK": "a pickle, which liftkit never opens; save the model with safe_serialization=True",
    **{
        bytes((0x80, protocol)): "a pickle, which liftkit never opens; save the model with safe_serialization=True"
        for protocol in range(2, 6)
    },
    b"<!DOCTYP": "a web page, not the weights; fetch the file again",
    b"<html": "a web page, not the weights; fetch the file again",
}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor: dtype name, shape, and where its bytes are, counted from the start of the payload."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def size(self) -> int:
        """Bytes."""
        return self.end - self.start


@dataclass(frozen=True)
class Header:
    """What a safetensors file says about itself."""

    path: Path
    tensors: dict[str, TensorEntry]
    metadata: dict[str, str]
    payload: int
    """Offset of the payload in the file."""
    stamp: Stamp | None = None
    """Of the file when its header was read."""


def read_header(path: Path) -> Header:
    """Parse and check the header of one file.

    Raises:
        UsageError: if the file is missing, truncated, a git-lfs pointer, a pickle, or its header lies.
    """
    with open_regular(path) as file:
        stamp = stamp_of(file)
    return _parsed(path, stamp)


@lru_cache(maxsize=256)
def _parsed(path: Path, stamp: Stamp) -> Header:
    """The header of a file as it is now: a command asks for it several times, and it is parsed once."""
    with open_regular(path, stamp) as file:
        lead = file.read(8)
        length = int.from_bytes(lead, "little") if len(lead) == 8 else -1
        raw = file.read(length) if 2 <= length <= min(MAX_HEADER, stamp.size - 8) else None
    if raw is None or not raw.startswith(b"{"):
        raise UsageError(_no_safetensors(path, lead, length, stamp.size))
    try:
        content = json.loads(raw.decode(), object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: its safetensors header is no valid JSON ({error}); fetch the file again") from error
    metadata = content.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise UsageError(f"{path}: its safetensors metadata is not a table of strings; fetch the file again")
    if len(content) > MOST_TENSORS:
        raise UsageError(f"{path}: {len(content)} tensors in one file, {MOST_TENSORS} at most; is it a model?")
    if sum(len(key) + len(value) for key, value in metadata.items()) > MOST_METADATA:
        raise UsageError(f"{path}: more than {MOST_METADATA} characters of metadata; is it the right file?")
    tensors = {name: _entry(path, name, value) for name, value in content.items()}
    _check_layout(path, tensors, stamp.size - 8 - length)
    header = Header(path, tensors, metadata, 8 + length, stamp)
    try:
        encode_header(tensors, metadata)
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{path}: its safetensors header holds text that is no Unicode; fetch the file again"
        ) from error
    return header


def encode_header(tensors: dict[str, TensorEntry], metadata: dict[str, str]) -> bytes:
    """The bytes before the payload: length and JSON, padded with spaces to a multiple of :data:`ALIGNMENT`."""
    content: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    for name, entry in tensors.items():
        content[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [entry.start, entry.end]}
    raw = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-(len(raw) + 8) % ALIGNMENT)
    return len(raw).to_bytes(8, "little") + raw


def laid_out(kinds: dict[str, tuple[str, tuple[int, ...]]]) -> dict[str, TensorEntry]:
    """Places for tensors of some dtypes and shapes, without gaps.

    The order is kept among tensors of a multiple of :data:`ALIGNMENT` bytes, which are almost all. Those of other sizes
    follow, the most even sizes first: so each begins at a multiple of the largest power of two in its size, up to
    :data:`ALIGNMENT`, which is a multiple of its dtype's size.
    """

    def evenness(name: str) -> int:
        size = tensor_bytes(*kinds[name])
        return min(size & -size, ALIGNMENT) if size else ALIGNMENT

    entries, position = {}, 0
    for name in sorted(kinds, key=evenness, reverse=True):
        size = tensor_bytes(*kinds[name])
        entries[name] = TensorEntry(*kinds[name], position, position + size)
        position += size
    return entries


def tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor."""
    return math.prod(shape) * DTYPE_BITS[dtype] // 8


def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """``object_pairs_hook`` of a JSON reader: ValueError where a key occurs twice, of which the last would win."""
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {key!r} occurs twice")
        result[key] = value
    return result


def _entry(path: Path, name: str, value: Any) -> TensorEntry:
    try:
        dtype, shape, (start, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        numbers = [*shape, start, end]
        if len(shape) > MOST_DIMENSIONS or not all(
            type(number) is int and 0 <= number <= LARGEST for number in numbers
        ):
            raise TypeError
        if isinstance(dtype, str) and dtype not in DTYPE_BITS:
            raise UsageError(_unknown_dtype(path, name, dtype))
        size = tensor_bytes(dtype, shape)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(
            f"{path}: tensor {shown(name)} has no valid dtype, shape and offsets; fetch the file again"
        ) from error
    if end - start != size:
        raise UsageError(
            f"{path}: tensor {shown(name)} should take {size} bytes ({dtype} {list(shape)}), its offsets say {end - start}"
        )
    return TensorEntry(dtype, shape, start, end)


def _check_layout(path: Path, tensors: dict[str, TensorEntry], payload: int) -> None:
    position = 0
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != position:
            what = "overlaps another" if entry.start < position else "leaves a gap before it"
            raise UsageError(
                f"{path}: tensor {shown(name)} {what} (offset {entry.start}, expected {position}); fetch the file again"
            )
        position = entry.end
        if position > payload:
            raise UsageError(
                f"{path}: truncated: tensor {shown(name)} ends at byte {position} of the data, the file holds {payload}; "
                "fetch the file again"
            )
    if position != payload:
        raise UsageError(f"{path}: {payload - position} bytes follow the last tensor; fetch the file again")


def _unknown_dtype(path: Path, name: str, dtype: str) -> str:
    if dtype in _PACKED:
        return (
            f"{path}: quantized: tensor {shown(name)} is of dtype {dtype}, less than a byte a number, which liftkit does "
            "not read; give the full-precision file"
        )
    return (
        f"{path}: tensor {shown(name)} is of dtype {shown(dtype, 20)}, which liftkit does not know; give a file in F32, "
        "F16 or BF16"
    )


def _no_safetensors(path: Path, lead: bytes, length: int, size: int) -> str:
    for magic, what in _MAGIC.items():
        if lead.startswith(magic):
            return f"{path}: {what}"
    if length > MAX_HEADER:
        return (
            f"{path}: no safetensors file: its header would take {length} bytes, {MAX_HEADER} at most; fetch it again"
        )
    return f"{path}: no safetensors file, or truncated ({size} bytes, header of {max(length, 0)}); fetch the file again"


def shown(name: str, most: int = 160) -> str:
    """A name from a file for a message: quoted, on one line, cut if it is long."""
    return repr(name if len(name) <= most else f"{name[:most]}...")
