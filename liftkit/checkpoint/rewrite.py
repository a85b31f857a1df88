"""Rewrite a few tensors of a safetensors file: all others are copied from file to file by the kernel."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING

from liftkit.checkpoint.copying import CHUNK, copy_range, fan_out, write_at, writing
from liftkit.checkpoint.follow import Ledger
from liftkit.checkpoint.header import DTYPE_BITS, Header, TensorEntry, encode_header, laid_out, tensor_bytes
from liftkit.checkpoint.parts import Part, compare_block, parts_of
from liftkit.checkpoint.source import open_regular, read_exactly
from liftkit.errors import ProofError, UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FLOATS = ("F64", "F32", "F16", "BF16")
_TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip


def read_tensor(header: Header, name: str) -> Tensor:
    """One tensor of a file, read alone.

    Raises:
        LiftkitError: if the file is no longer the one whose header this is.
    """
    import torch

    entry = header.tensors[name]
    if not entry.size:
        return torch.empty(entry.shape, dtype=torch_dtype(entry.dtype))
    raw = bytearray(entry.size)
    with open_regular(header.path, header.stamp) as file:
        read_exactly(file.fileno(), header.payload + entry.start, memoryview(raw), header.path)
    return torch.frombuffer(raw, dtype=torch_dtype(entry.dtype)).reshape(entry.shape)


def rewrite_file(
    source: Header,
    target: Path,
    changed: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None = None,
    progress: Callable[[int], None] = lambda written: None,
    ledger: Ledger | None = None,
) -> None:
    """Write a copy of a safetensors file with some tensors changed or added.

    Args:
        source: the file's header.
        target: the new file; appears whole or not at all.
        changed: replaces the source's tensors of the same name; names that it does not have are added at the end.
        dtype: cast floating tensors of the source to this; None keeps their bytes.
        progress: called with the number of bytes written, piece by piece.
        ledger: takes its digest beside the writing, and compares both ends of what is copied with the source.

    Raises:
        LiftkitError: if the source changed since its header was read, or the disk refuses.
        UsageError: if a tensor does not fit into ``dtype``.
    """
    entries = _plan(source, changed, dtype)
    lead = encode_header(entries, source.metadata or {"format": "pt"})
    parts = _parts(source, Header(target, entries, {}, len(lead)), changed.keys())
    size = max((part.end for part in parts), default=len(lead))
    with writing(source.path, source.stamp, target, size, parts, ledger) as (original, file, reached):
        write_at(file, 0, lead)
        reached(len(lead))
        for piece in _pieces(parts):
            if isinstance(piece, Part) and piece.name in changed:
                _write_tensor(file, piece.start, changed[piece.name])
                reached(piece.end)
                progress(piece.end - piece.start)
            elif isinstance(piece, Part):
                for raw, at in _cast_chunks(original, source.path, piece, progress):
                    write_at(file, at, raw)
                    reached(at + len(raw))
            else:
                start, end, origin = piece
                copy_range(original, origin, end - start, file, start, fan_out(progress, reached))


def compare_files(source: Header, target: Header, changed: Container[str]) -> None:
    """Raise unless a rewritten file holds its source's tensors, cast where it has another dtype, all but the changed ones.

    Raises:
        ProofError: naming the first tensor that is missing, has another shape or other bytes.
    """
    for name, entry in source.tensors.items():
        found = target.tensors.get(name)
        if found is None or (name not in changed and found.shape != entry.shape):
            what = "is missing" if found is None else f"has shape {list(found.shape)}, its source {list(entry.shape)}"
            raise ProofError(f"{target.path}: tensor {name!r} {what}")
    added = next((name for name in target.tensors if name not in source.tensors and name not in changed), None)
    if added is not None:
        raise ProofError(f"{target.path}: tensor {added!r} is not in {source.path}")
    with open_regular(source.path, source.stamp) as original, open_regular(target.path, target.stamp) as written:
        files = (written.fileno(), target.path), (original.fileno(), source.path)
        for part in _parts(source, target, changed):
            for at in range(part.start, part.end, part.step) if part.origin is not None else ():
                compare_block(part, at, min(part.step, part.end - at), *files)


def rewritten_size(source: Header, changed: dict[str, TensorEntry], dtype: str | None) -> int:
    """Bytes of the tensors that :func:`rewrite_file` would write (its header aside)."""
    kept = {name: entry for name, entry in source.tensors.items() if name not in changed}
    total = sum(entry.size for entry in changed.values())
    return total + sum(tensor_bytes(cast_name(entry.dtype, dtype), entry.shape) for entry in kept.values())


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a safetensors dtype name.

    Raises:
        UsageError: if torch here has no such dtype.
    """
    import torch

    if name not in _TORCH_NAMES:
        raise UsageError(f"tensors of dtype {name} are not supported; convert the full-precision checkpoint")
    return getattr(torch, _TORCH_NAMES[name])


def dtype_name(dtype: torch.dtype) -> str:
    """The safetensors name of a torch dtype."""
    return {value: key for key, value in _TORCH_NAMES.items()}[str(dtype).removeprefix("torch.")]


def cast_name(name: str, wanted: str | None) -> str:
    """The dtype that a tensor gets: floating ones the wanted, others keep theirs."""
    return wanted if wanted is not None and name in FLOATS else name


def casts(header: Header, wanted: str | None) -> bool:
    """Whether any of a file's tensors gets another dtype."""
    return any(cast_name(entry.dtype, wanted) != entry.dtype for entry in header.tensors.values())


def _plan(source: Header, changed: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, TensorEntry]:
    """The new file's entries: in the source's order of bytes, then what is added, as far as they stay aligned."""
    wanted = None if dtype is None else dtype_name(dtype)
    names = sorted(source.tensors, key=lambda name: source.tensors[name].start)
    kinds = {name: (cast_name(source.tensors[name].dtype, wanted), source.tensors[name].shape) for name in names}
    kinds |= {name: (dtype_name(tensor.dtype), tuple(tensor.shape)) for name, tensor in changed.items()}
    return laid_out(kinds)


def _parts(source: Header, target: Header, changed: Container[str]) -> list[Part]:
    """The new file's tensors, with the place in the source of all that are not changed."""
    kept = {name: entry for name, entry in source.tensors.items() if name not in changed}
    parts = parts_of(target, {name: source.payload + entry.start for name, entry in kept.items()})
    for index, part in enumerate(parts):
        if part.origin is not None and source.tensors[part.name].dtype != target.tensors[part.name].dtype:
            old, new = source.tensors[part.name].dtype, target.tensors[part.name].dtype
            cast = _caster(source.path, part.name, torch_dtype(old), torch_dtype(new))
            parts[index] = replace(part, cast=cast, ratio=DTYPE_BITS[old] / DTYPE_BITS[new])
    return parts


def _pieces(parts: list[Part]) -> Iterator[Part | tuple[int, int, int]]:
    """What a file is made of: ranges (start, end, origin) that are copied, and tensors that are written anew."""
    run: tuple[int, int, int] | None = None
    for part in parts:
        if part.origin is None or part.cast is not None:
            if run:
                yield run
            run = None
            yield part
        # Neighbors that stay neighbors go in one piece.
        elif run and run[1] == part.start and run[2] + run[1] - run[0] == part.origin:
            run = (run[0], part.end, run[2])
        else:
            if run:
                yield run
            run = (part.start, part.end, part.origin)
    if run:
        yield run


def _caster(path: Path, name: str, old: torch.dtype, new: torch.dtype) -> Callable[[memoryview], bytes]:
    def cast(raw: memoryview) -> bytes:
        import torch

        tensor = torch.frombuffer(raw, dtype=old)
        result = tensor.to(new)
        if not torch.equal(result.isfinite(), tensor.isfinite()):
            raise UsageError(
                f"{path}: tensor {name!r} holds {tensor.abs().max().item():.3g}, which {str(new).removeprefix('torch.')} "
                "cannot hold; choose bfloat16 or float32"
            )
        return result.view(torch.uint8).numpy().tobytes()

    return cast


def _cast_chunks(
    source: IO[bytes], path: Path, part: Part, progress: Callable[[int], None]
) -> Iterator[tuple[bytes, int]]:
    """A tensor in its new dtype, chunk by chunk, each with its place in the new file."""
    assert part.origin is not None
    assert part.cast is not None
    for at in range(part.start, part.end, CHUNK):
        count = min(CHUNK, part.end - at)
        raw = memoryview(bytearray(round(count * part.ratio)))
        read_exactly(source.fileno(), part.origin + round((at - part.start) * part.ratio), raw, path)
        yield part.cast(raw), at
        progress(count)


def _write_tensor(file: IO[bytes], at: int, tensor: Tensor) -> None:
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.numel():
        write_at(file, at, flat.view(torch.uint8).numpy().data)
