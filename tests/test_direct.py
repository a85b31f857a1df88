"""Copies past the page cache: the same bytes as through it, or the same error."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import pytest

from liftkit.checkpoint import direct
from liftkit.checkpoint.copying import copy_file, copy_range
from liftkit.checkpoint.direct import PAGE, copy_direct
from liftkit.errors import LiftkitError


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of some pages count as large ones, on whatever file system they are."""
    monkeypatch.setattr(direct, "FROM_BYTES", PAGE)
    monkeypatch.setattr(direct, "MAPPED", 3 * PAGE)
    monkeypatch.setattr(direct, "BUFFERED", 2 * PAGE)
    monkeypatch.setattr(direct, "_file_system", lambda device: "ext4")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Ten pages and a piece."""
    path = tmp_path / "source"
    path.write_bytes(os.urandom(10 * PAGE + 123))
    return path


def copied(source: Path, offset: int, size: int, position: int) -> tuple[bytes, list[tuple[int, int]]]:
    """What a range becomes behind ``position`` bytes that are there, and what was said of its progress."""
    target, steps = source.with_name("target"), list[tuple[int, int]]()
    with source.open("rb", buffering=0) as original, target.open("wb") as file:
        os.pwrite(file.fileno(), b"x" * position, 0)
        copy_range(original, offset, size, file, position, lambda count, at: steps.append((count, at)))
    return target.read_bytes(), steps


@pytest.mark.parametrize("position", [0, 100, PAGE, 2 * PAGE + 8])
@pytest.mark.parametrize("offset", [0, 1, 100, PAGE, PAGE + 8])
@pytest.mark.parametrize("size", [0, 50, PAGE, 7 * PAGE, 8 * PAGE + 77])
def test_every_range_arrives_whole_and_nothing_else_changes(
    source: Path, offset: int, size: int, position: int
) -> None:
    found, steps = copied(source, offset, size, position)
    assert found == b"x" * position + source.read_bytes()[offset : offset + size]
    assert sum(count for count, _ in steps) == size
    assert [at for _, at in steps] == sorted(at for _, at in steps)
    assert not size or steps[-1][1] == position + size


def test_whole_pages_go_past_the_cache_where_the_disk_allows(source: Path) -> None:
    with source.open("rb", buffering=0) as original, source.with_name("target").open("wb") as file:
        done = copy_direct(original, 8, 5 * PAGE + 9, file, 0, lambda count, at: None)
    # Some file systems have no way past the cache.
    assert done in (0, 5 * PAGE)
    assert source.with_name("target").read_bytes() == source.read_bytes()[8 : 8 + done]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSPC, errno.EFAULT])
@pytest.mark.parametrize("offset", [0, 8])
@pytest.mark.parametrize("after", [0, 1])
def test_what_the_disk_will_not_take_directly_goes_through_the_cache(
    source: Path, code: int, offset: int, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, calls = direct._write, iter(range(100))

    def write(handle: int, block: memoryview, position: int) -> int:
        if next(calls) >= after:
            raise OSError(code, os.strerror(code))
        return honest(handle, block, position)

    monkeypatch.setattr(direct, "_write", write)
    assert copied(source, offset, 9 * PAGE, 0)[0] == source.read_bytes()[offset : offset + 9 * PAGE]


@pytest.mark.parametrize("offset", [0, 8])
def test_a_write_that_ends_early_is_gone_on_with(source: Path, offset: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(handle: int, block: memoryview, position: int) -> int:
        with source.with_name("target").open("r+b") as target:
            return os.pwrite(target.fileno(), bytes(block[: len(block) - 512]), position)

    monkeypatch.setattr(direct, "_write", write)
    assert copied(source, offset, 9 * PAGE, 0)[0] == source.read_bytes()[offset : offset + 9 * PAGE]


@pytest.mark.parametrize("offset", [0, 8])
def test_a_source_that_is_too_short_is_named(source: Path, offset: int) -> None:
    with pytest.raises(LiftkitError, match="source"):
        copied(source, offset, 11 * PAGE, 0)


@pytest.mark.parametrize("size", [0, 5 * PAGE, 5 * PAGE + 7, 12 * PAGE])
def test_a_source_that_changes_meanwhile_is_named_and_no_copy_is_left(source: Path, size: int) -> None:
    target = source.with_name("target")
    with pytest.raises(LiftkitError, match=re.escape(f"{source}: ")):
        copy_file(source, target, progress=lambda count: os.truncate(source, size))
    assert os.listdir(source.parent) == [source.name]
    assert source.stat().st_size == size


def test_other_file_systems_are_left_to_share_bytes(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "_file_system", lambda device: "btrfs")
    monkeypatch.setattr(direct, "_opened", lambda target: pytest.fail("opened"))
    assert copied(source, 0, 9 * PAGE, 0)[0] == source.read_bytes()[: 9 * PAGE]
