"""The tensors of a file that is being written: where their bytes come from, and what is known of them block by block."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from liftkit.checkpoint.header import Header
from liftkit.checkpoint.source import read_exactly
from liftkit.errors import ProofError

BLOCK = 512 * 1024
# The first bit pattern that is no finite number: bytes of an element and the pattern, sign aside.
FINITE_BELOW = {
    "F64": (8, 0x7FF0000000000000), "F32": (4, 0x7F800000), "F16": (2, 0x7C00), "BF16": (2, 0x7F80),
    "F8_E5M2": (1, 0x7C), "F8_E4M3": (1, 0x7F),
}  # fmt: skip


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
        dtype: of the elements, as safetensors names it.
    """

    name: str
    start: int
    end: int
    origin: int | None = None
    cast: Callable[[memoryview], bytes] | None = None
    ratio: float = 1.0
    dtype: str = ""

    @property
    def step(self) -> int:
        """Bytes to read at once: whole words, whose bytes in the source fit into a block."""
        return int(BLOCK / max(1, self.ratio)) // 8 * 8


def parts_of(header: Header, origins: Mapping[str, int] | None = None) -> list[Part]:
    """The tensors of a file, in the order of their bytes.

    Args:
        header: of the file.
        origins: where in the source file their bytes are, by name.
    """
    entries = sorted(header.tensors.items(), key=lambda item: item[1].start)
    base, origins = header.payload, origins or {}
    return [
        Part(name, base + entry.start, base + entry.end, origins.get(name), dtype=entry.dtype)
        for name, entry in entries
    ]


def read_original(part: Part, at: int, count: int, buffer: memoryview, source: int, path: Path) -> memoryview:
    """What a copied part should hold at a place in the new file, read from the source (open; ``path`` is its name)."""
    assert part.origin is not None
    original = buffer[: round(count * part.ratio)]
    read_exactly(source, part.origin + round((at - part.start) * part.ratio), original, path)
    return memoryview(part.cast(original)) if part.cast else original


def compare_block(part: Part, at: int, count: int, target: tuple[int, Path], source: tuple[int, Path]) -> None:
    """Raise unless a copied part holds its source's bytes at a place in the new file; both are open.

    Raises:
        ProofError: naming the tensor.
    """
    # Comparing a bytearray is one memcmp; comparing memoryviews is a loop over their elements.
    found = bytearray(count)
    read_exactly(target[0], at, memoryview(found), target[1])
    room = memoryview(bytearray(round(count * part.ratio)))
    if found != read_original(part, at, count, room, *source):
        raise ProofError(
            f"{target[1]}: tensor {part.name!r} is not what {source[1]} holds, near its byte {at - part.start}; "
            "check disk and memory, and run again"
        )


def word_sum(block: memoryview) -> int:
    """Its bytes as little-endian 64-bit words, added up; what is left at the end counts as one more."""
    whole = len(block) - len(block) % 8
    return int(np.frombuffer(block[:whole], "<u8").sum(dtype=np.uint64)) + int.from_bytes(block[whole:], "little")


def is_finite(block: memoryview, dtype: str) -> bool:
    """Whether all numbers are finite, for whole elements of a floating dtype; True for others."""
    if dtype not in FINITE_BELOW or not len(block):
        return True
    size, limit = FINITE_BELOW[dtype]
    # As integers, positive numbers rise with their pattern; negative ones do if read without a sign.
    positive, negative = np.frombuffer(block, f"<i{size}").max(), np.frombuffer(block, f"<u{size}").max()
    return int(positive) < limit and int(negative) < limit + (1 << (8 * size - 1))
