"""Bytes that are read back beside the work, and trees of tensors that are compared."""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from liftkit.checkpoint import copying, follow
from liftkit.checkpoint.copying import copy_file, extract_file
from liftkit.checkpoint.follow import Ledger, digest_file
from liftkit.checkpoint.header import read_header
from liftkit.checkpoint.model import Weights
from liftkit.checkpoint.rewrite import compare_files, rewrite_file
from liftkit.conversion import verify
from liftkit.conversion.audit import audit
from liftkit.errors import LiftkitError, ProofError, UsageError
from tests.big_models import convert, manifest, shards

__all__ = ["shards"]


def digested(path: Path) -> dict[str, int]:
    """Each tensor's sum, computed all at once from the library's own reading."""
    raw, header = path.read_bytes(), read_header(path)
    result = {}
    for name, entry in header.tensors.items():
        piece = raw[header.payload + entry.start : header.payload + entry.end]
        words = [int.from_bytes(piece[at : at + 8], "little") for at in range(0, len(piece), 8)]
        result[name] = sum(words) % 2**64
    return result


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.integers(0, 700), min_size=1, max_size=5),
    dtype=st.sampled_from([None, torch.float16, torch.float32]),
    data=st.data(),
)
def test_what_a_ledger_takes_down_is_what_is_there(
    sizes: list[int],
    dtype: torch.dtype | None,
    data: st.DataObject,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path_factory.mktemp("ledger")
    kinds = [torch.bfloat16, torch.float32, torch.uint8]
    tensors = {str(n): torch.randn(size).to(data.draw(st.sampled_from(kinds))) for n, size in enumerate(sizes)}
    save_file(tensors, folder / "source.safetensors", {"format": "pt"})
    changed = {name: torch.randn(5) for name in data.draw(st.sets(st.sampled_from(sorted(tensors)), max_size=2))}
    for module, name in ((follow, "BLOCK"), (copying, "CHUNK"), (follow, "EDGE")):
        monkeypatch.setattr(module, name, data.draw(st.sampled_from([64, 4096])))
    source = read_header(folder / "source.safetensors")
    with Ledger(folder) as ledger:
        rewrite_file(
            source, folder / "written.safetensors", {**changed, "new": torch.ones(3)}, dtype=dtype, ledger=ledger
        )
        copy_file(source.path, folder / "copy.safetensors", header=source, ledger=ledger)
        copy_file(source.path, folder / "plain.bin", ledger=ledger)
        found = ledger.digests()
    assert manifest(folder) == {name: digest_file(folder / name).value for name in manifest(folder)}
    for name in ("written.safetensors", "copy.safetensors"):
        assert found[name] == digest_file(folder / name)
        assert found[name].value == manifest(folder)[name]
        assert {key: int(value, 16) for key, value in found[name].tensors.items()} == digested(folder / name)
    assert found["plain.bin"] == follow.Digest(manifest(folder)["source.safetensors"])
    written = load_file(folder / "written.safetensors")
    for name, tensor in tensors.items():
        wanted = tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
        assert torch.equal(written[name], changed.get(name, wanted))
    compare_files(source, read_header(folder / "written.safetensors"), {*changed, "new"})


@pytest.mark.parametrize("cast", [None, torch.float32])
def test_a_tensor_that_arrives_in_a_wrong_place_is_found_at_once(
    cast: torch.dtype | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {name: torch.randn(30000).bfloat16() for name in "abc"}
    save_file(tensors, tmp_path / "source.safetensors")
    honest = os.pwrite

    def shift(handle: int, raw: Any, at: int) -> int:
        return honest(handle, raw, at + 2 * (at > 1000))

    monkeypatch.setattr("os.copy_file_range", lambda *arguments: (_ for _ in ()).throw(OSError(38, "none")))
    monkeypatch.setattr("os.pwrite", shift)
    monkeypatch.setattr(copying, "CHUNK", 20000)
    expected = r"written.safetensors: tensor '[abc]' is not what .*source.safetensors holds"
    with pytest.raises(ProofError, match=expected), Ledger(tmp_path) as ledger:
        source = read_header(tmp_path / "source.safetensors")
        rewrite_file(source, tmp_path / "written.safetensors", {}, dtype=cast, ledger=ledger)
        ledger.digests()


@pytest.mark.parametrize("cast", ["auto", "float32"])
def test_a_byte_that_arrives_wrong_is_found_by_verify(
    cast: str, shards: Path, lift_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest holds the source's bytes, not the copy's: what the copying spoils comes out."""
    honest, flipped = os.pwrite, []

    def flip(handle: int, raw: Any, at: int) -> int:
        count = honest(handle, raw, at)
        if count > 16000 and not flipped:
            flipped.append(at)
            honest(handle, bytes([raw[2 * count // 5] ^ 64]), at + 2 * count // 5)
        return count

    monkeypatch.setattr("os.copy_file_range", lambda *arguments: (_ for _ in ()).throw(OSError(38, "none")))
    monkeypatch.setattr("os.pwrite", flip)
    monkeypatch.setattr(follow, "EDGE", 8)
    convert(shards, tmp_path / "out", lift_file, dtype=cast)
    assert flipped
    problems = audit(tmp_path / "out").checks[0].problems
    assert len(problems) == 1
    assert re.fullmatch(r"(transformer|latent/vae)/\S+: changed: tensor '\S+'", problems[0])


def test_every_processor_hashes_in_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More files than may be open at once, and one worker that is busy: the caller's thread takes its part."""
    monkeypatch.setattr(follow, "_processors", lambda: 1)
    (tmp_path / "source").write_bytes(os.urandom(5000))
    release = threading.Event()
    with Ledger(tmp_path, most=3) as ledger:
        ledger._hashing.submit(release.wait, 60)
        for number in range(8):
            copy_file(tmp_path / "source", tmp_path / f"{number}.bin", ledger=ledger)
        found = ledger.digests()
        release.set()
    assert {digest.value for digest in found.values()} == {manifest(tmp_path)["source"]}
    assert len(found) == 8


def test_comparing_finds_missing_added_and_other_tensors(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(4, 2), "b": torch.randn(3)}
    spoiled = {
        "'b' is missing": {"a": tensors["a"]},
        "'c' is not in": {**tensors, "c": torch.ones(1)},
        "'a' has shape": {**tensors, "a": tensors["a"].reshape(2, 4)},
        "'b' is not what": {**tensors, "b": tensors["b"].flip(0)},
    }
    save_file(tensors, tmp_path / "source.safetensors")
    source = read_header(tmp_path / "source.safetensors")
    for said, others in spoiled.items():
        save_file(others, tmp_path / "other.safetensors")
        with pytest.raises(ProofError, match=said):
            compare_files(source, read_header(tmp_path / "other.safetensors"), set())
    compare_files(source, read_header(tmp_path / "other.safetensors"), {"b"})


def test_shards_that_were_mixed_are_found(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "one.safetensors")
    header = read_header(tmp_path / "one.safetensors")
    source = Weights({"one": header}, dict.fromkeys("ab", "one"))
    with pytest.raises(ProofError, match="not together"):
        verify.check_copied(source, Weights({"one": header, "two": header}, {"a": "one", "b": "two"}), set())


def test_some_tensors_of_several_files_go_into_one(tmp_path: Path) -> None:
    one, two = {"a": torch.randn(3).bfloat16(), "b": torch.randn(2)}, {"c": torch.arange(3), "d": torch.zeros(0, 2)}
    for name, tensors in (("one", one), ("two", two)):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    headers = [read_header(tmp_path / f"{name}.safetensors") for name in ("one", "two")]
    extract_file({"a": headers[0], "d": headers[1], "c": headers[1]}, tmp_path / "some.safetensors")
    found = load_file(tmp_path / "some.safetensors")
    assert found.keys() == {"a", "c", "d"}
    assert all(torch.equal(found[name], {**one, **two}[name]) for name in found)
    starts = {name: entry.start % 8 for name, entry in read_header(tmp_path / "some.safetensors").tensors.items()}
    assert starts["c"] == 0, "aligned for its dtype"


@pytest.mark.parametrize("moment", ["before", "during"])
@pytest.mark.parametrize("change", ["touched", "grown", "replaced", "removed"])
def test_a_source_that_changes_underneath(
    change: str, moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "source.safetensors"
    save_file({"a": torch.randn(100)}, path)
    header = read_header(path)

    def spoil() -> None:
        if change == "touched":
            os.utime(path, ns=(1, 1))
        elif change == "grown":
            path.write_bytes(path.read_bytes() + b"x")
        elif change == "replaced":
            path.with_name("x").write_bytes(path.read_bytes())
            path.with_name("x").replace(path)
        else:
            path.unlink()

    if moment == "before":
        spoil()
    else:
        honest = copying.copy_range
        monkeypatch.setattr("liftkit.checkpoint.rewrite.copy_range", lambda *arguments: (honest(*arguments), spoil()))
    expected = "cannot be read" if change == "removed" else "changed since it was looked at first"
    with pytest.raises((LiftkitError, UsageError), match=expected):
        rewrite_file(header, tmp_path / "out.safetensors", {})
