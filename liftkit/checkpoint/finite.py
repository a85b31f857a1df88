"""Weights whose numbers are none: found in the files, before anything is computed with them."""

from __future__ import annotations

from collections.abc import Iterable

from liftkit.checkpoint.header import Header
from liftkit.checkpoint.parts import BLOCK, is_finite, parts_of
from liftkit.checkpoint.source import open_regular, read_exactly
from liftkit.errors import UsageError

BUDGET = 4 << 30
"""Bytes that are read before the work begins: what is beyond is looked at while it is copied."""


def check_files(headers: Iterable[Header], budget: float = BUDGET) -> None:
    """Raise unless all numbers in weight files are finite, the smallest files first and as far as the budget goes.

    Raises:
        UsageError: naming the file and the tensor.
    """
    for header in sorted(headers, key=lambda each: sum(entry.size for entry in each.tensors.values())):
        budget -= sum(entry.size for entry in header.tensors.values())
        if budget < 0:
            return
        name = first_not_finite(header)
        if name is not None:
            raise UsageError(message(header.path, name))


def first_not_finite(header: Header) -> str | None:
    """The first tensor of a file that holds NaN or an infinite number; None if there is none."""
    buffer = memoryview(bytearray(BLOCK))
    with open_regular(header.path, header.stamp) as file:
        for part in parts_of(header):
            for at in range(part.start, part.end, part.step):
                block = buffer[: min(part.step, part.end - at)]
                read_exactly(file.fileno(), at, block, header.path)
                if not is_finite(block, part.dtype):
                    return part.name
    return None


def message(where: object, name: str) -> str:
    """What is wrong with a file, and what to do."""
    return f"{where}: tensor {name!r} holds NaN or infinite numbers; download or save the model again"
