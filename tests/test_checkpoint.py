"""Safetensors headers and rewriting: bytes in, bytes out, and files that lie."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load, load_file, save, save_file

from liftkit.checkpoint import rewrite
from liftkit.checkpoint.copying import copy_range
from liftkit.checkpoint.files import atomic_file, write_safetensors
from liftkit.checkpoint.folder import atomic_folder
from liftkit.checkpoint.header import DTYPE_BITS, encode_header, laid_out, read_header
from liftkit.checkpoint.model import read_weights
from liftkit.checkpoint.rewrite import read_tensor, rewrite_file
from liftkit.errors import LiftkitError, UsageError
from tests.safetensors_files import TENSORS, source

__all__ = ["source"]


def lying(path: Path, header: object, payload: bytes = b"") -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + payload)
    return path


def test_header_agrees_with_the_library(source: Path) -> None:
    header = read_header(source)
    assert header.tensors.keys() == TENSORS.keys()
    assert header.metadata == {"format": "pt", "note": "kept"}
    for name, tensor in TENSORS.items():
        assert torch.equal(read_tensor(header, name), tensor)
        assert header.tensors[name].shape == tuple(tensor.shape)


def payload(path: Path, name: str) -> bytes:
    header = read_header(path)
    entry = header.tensors[name]
    return path.read_bytes()[header.payload + entry.start : header.payload + entry.end]


def test_rewriting_nothing_keeps_every_byte(source: Path, tmp_path: Path) -> None:
    rewrite_file(read_header(source), tmp_path / "same.safetensors", {})
    written = read_header(tmp_path / "same.safetensors")
    assert written.metadata["note"] == "kept"
    assert written.tensors.keys() == TENSORS.keys()
    assert all(payload(tmp_path / "same.safetensors", name) == payload(source, name) for name in TENSORS)


def test_tensors_of_even_sizes_keep_their_order_and_are_copied_in_one_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of real models are: whatever their order in the source, the kernel copies them in large pieces."""
    path = tmp_path / "even.safetensors"
    kinds = {name: ("BF16", (count, 32)) for name, count in (("z", 3), ("m", 1), ("a", 2), ("k", 5))}
    raw = encode_header(laid_out(kinds), {"format": "pt"})
    path.write_bytes(raw + bytes(range(64)) * 11)
    header = read_header(path)
    assert [name for name, _ in sorted(header.tensors.items(), key=lambda item: item[1].start)] == list("zmak")
    pieces: list[int] = []
    monkeypatch.setattr(rewrite, "copy_range", lambda *given: (pieces.append(given[2]), copy_range(*given)))
    rewrite_file(header, tmp_path / "out.safetensors", {"added": torch.zeros(3)})
    assert pieces == [64 * 11]
    assert all(payload(tmp_path / "out.safetensors", name) == payload(path, name) for name in kinds)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(st.text("abcxyz", min_size=1), st.tuples(st.sampled_from(sorted(DTYPE_BITS)), st.integers(0, 300)))
)
def test_written_tensors_begin_at_the_largest_power_of_two_in_their_size(kinds: dict[str, tuple[str, int]]) -> None:
    entries = laid_out({name: (dtype, (count,)) for name, (dtype, count) in kinds.items()})
    start = len(encode_header(entries, {"format": "pt"}))
    assert start % 64 == 0
    position = 0
    for entry in sorted(entries.values(), key=lambda entry: (entry.start, entry.end)):
        assert entry.start == position, "no gap"
        position = entry.end
        even = next(power for power in (64, 32, 16, 8, 4, 2, 1) if entry.size % power == 0)
        assert (start + entry.start) % even == 0
        assert even >= DTYPE_BITS[entry.dtype] // 8


def test_small_files_are_aligned_and_the_library_reads_them(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x.safetensors", {**TENSORS, "even": torch.randn(4, 16)}, {"key": "value"})
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == TENSORS.keys() | {"even"}
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in TENSORS.items()
    )
    assert found["even"].data_ptr() % 64 == 0, "mapped, and aligned"
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"key": "value"}


@pytest.mark.parametrize("name", sorted(TENSORS))
def test_one_tensor_changes_and_all_others_stay(name: str, source: Path, tmp_path: Path) -> None:
    changed = {name: torch.full((7, 2), 3.0), "new": torch.ones(3, dtype=torch.float16)}
    told: list[int] = []
    rewrite_file(read_header(source), tmp_path / "out.safetensors", changed, progress=told.append)
    found = load_file(tmp_path / "out.safetensors")
    assert found.keys() == TENSORS.keys() | {"new"}
    for key, value in {**TENSORS, **changed}.items():
        assert torch.equal(found[key], value)
    assert sum(told) == sum(value.numel() * value.element_size() for value in found.values())


def test_casting_leaves_integers_alone(source: Path, tmp_path: Path) -> None:
    rewrite_file(read_header(source), tmp_path / "out.safetensors", {}, dtype=torch.float16)
    found = load_file(tmp_path / "out.safetensors")
    assert found["b"].dtype == torch.int64
    assert {found[name].dtype for name in ("a", "c", "empty", "scalar")} == {torch.float16}
    assert torch.equal(found["c"], TENSORS["c"].half())


def test_copying_without_kernel_help(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> int:
        raise OSError(38, "not implemented")

    monkeypatch.setattr("os.copy_file_range", refuse)
    rewrite_file(read_header(source), tmp_path / "out.safetensors", {"a": torch.zeros(1)})
    assert torch.equal(load_file(tmp_path / "out.safetensors")["c"], TENSORS["c"])


def test_a_source_that_shrinks_is_noticed(source: Path, tmp_path: Path) -> None:
    with (
        source.open("rb") as file,
        (tmp_path / "out").open("wb") as target,
        pytest.raises(LiftkitError, match="shorter"),
    ):
        copy_range(file, 0, source.stat().st_size + 1, target, 0, lambda count, position: None)


A = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "payload", "expected"),
    [
        ({"a": A}, b"\0" * 7, "truncated"),
        ({"a": A}, b"\0" * 9, "bytes follow the last tensor"),
        ({"a": A, "b": A}, b"\0" * 8, "overlaps"),
        ({"a": {**A, "data_offsets": [4, 12]}}, b"\0" * 12, "gap"),
        ({"a": {**A, "data_offsets": [0, 4]}}, b"\0" * 4, "should take 8 bytes"),
        ({"a": {**A, "data_offsets": [8, 0]}}, b"\0" * 8, "should take 8 bytes"),
        ({"a": {**A, "shape": [-2]}}, b"\0" * 8, "no valid dtype, shape and offsets"),
        ({"a": {**A, "shape": [2**40, 2**40]}}, b"\0" * 8, "should take"),
        ({"a": {**A, "shape": [2**62, 2**62]}}, b"\0" * 8, "no valid dtype"),
        ({"a": {**A, "dtype": "F33"}}, b"\0" * 8, "dtype 'F33', which liftkit does not know"),
        ({"a": {**A, "dtype": "F4"}}, b"\0" * 8, "quantized: tensor 'a' is of dtype F4"),
        ({"a": {**A, "dtype": []}}, b"\0" * 8, "no valid dtype"),
        ({"a": 5}, b"", "no valid dtype"),
        (b'{"a": {}, "a": {}}', b"", "occurs twice"),
        (b"{" * 100_000, b"", "no valid JSON"),
        (b"[1, 2]", b"", "no safetensors file"),
        ({"__metadata__": {"x": 1}}, b"", "table of strings"),
    ],
)
def test_headers_that_lie(header: object, payload: bytes, expected: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=expected):
        read_header(lying(tmp_path / "x.safetensors", header, payload))


def test_a_huge_header_is_not_allocated(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes((10**15).to_bytes(8, "little") + b"{}")
    with pytest.raises(UsageError, match="no safetensors file"):
        read_header(path)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200), st.integers(0, 250))
def test_no_bytes_crash_the_parser(tmp_path: Path, noise: bytes, place: int) -> None:
    """Any file is a header or a UsageError."""
    good = save({"a": torch.zeros(4), "b": torch.ones(2, 3)})
    path = tmp_path / "x.safetensors"
    path.write_bytes(good[:place] + noise + good[place + len(noise) :])
    try:
        header = read_header(path)
    except UsageError as error:
        assert str(error).startswith(str(path))
    else:
        assert all(entry.end <= path.stat().st_size for entry in header.tensors.values())


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.text(min_size=1, max_size=8), st.integers(0, 5), max_size=6))
def test_headers_survive_encoding(names: dict[str, int]) -> None:
    names.pop("__metadata__", None)
    tensors = {name: torch.full((count,), 1.0) for name, count in names.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        save_file(tensors, path)
        header = read_header(path)
        raw = encode_header(header.tensors, header.metadata)
        assert load(raw + path.read_bytes()[header.payload :]).keys() == tensors.keys()


def sharded(folder: Path, weight_map: dict[str, str]) -> Path:
    save_file({"a": torch.zeros(2)}, folder / "one.safetensors")
    save_file({"b": torch.zeros(2)}, folder / "two.safetensors")
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"GGUF\3\0\0\0\1\0\0\0\0\0\0\0", "quantized file in GGUF format"),
        (b"PK\3\4\0\0\0\0\0\0", "a pickle"),
        (b"\x80\x02}q\0.", "a pickle"),
        (b"\x80\x05\x95\0\0\0\0\0\0\0\0}.", "a pickle"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1", "git-lfs pointer"),
        (b"", "truncated"),
    ],
)
def test_other_formats_are_known_by_their_first_bytes(content: bytes, expected: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UsageError, match=expected):
        read_header(tmp_path / "model.safetensors")


def test_tensors_that_share_memory_are_written_apart(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(4, 3)
    shared = {"a": whole, "same": whole, "rows": whole[1:3], "columns": whole[:, :2], "turned": whole.T}
    write_safetensors(tmp_path / "x.safetensors", shared)
    found = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in shared.items())


@pytest.mark.parametrize(
    ("weight_map", "expected"),
    [
        ({"a": "one.safetensors", "b": "../two.safetensors"}, "no plain name"),
        ({"a": "one.safetensors", "b": "/etc/passwd"}, "no plain name"),
        ({"a": "one.safetensors", "b": "two\n.safetensors"}, "no plain name"),
        ({"a": "one.safetensors"}, None),
        ({"a": "one.safetensors", "b": "one.safetensors"}, "tensor 'b' should be in one"),
        ({"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}, "'c' should be in two.safetensors"),
        ({"a": "one.safetensors", "b": "three.safetensors"}, "three.safetensors: missing, 1 of the 2 shards"),
        ({}, "no weight_map"),
    ],
)
def test_indexes_that_lie(weight_map: dict[str, str], expected: str | None, tmp_path: Path) -> None:
    folder = sharded(tmp_path, weight_map)
    if expected is None:
        assert read_weights(folder).where == weight_map
        return
    with pytest.raises(UsageError, match=expected):
        read_weights(folder)


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    folder = sharded(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    save_file({"a": torch.zeros(2), "b": torch.zeros(2)}, folder / "two.safetensors")
    with pytest.raises(UsageError, match="stands in two shards"):
        read_weights(folder)


def test_an_error_of_a_library_is_one_line(tmp_path: Path) -> None:
    """OSErrors of diffusers and the Hub have no strerror, and several lines."""
    with pytest.raises(LiftkitError, match=r"first line second line; nothing"), atomic_folder(tmp_path / "out"):
        raise OSError("first line\n\n  second line")
    with pytest.raises(LiftkitError, match=r"\(no room\); nothing"), atomic_file(tmp_path / "a"):
        raise OSError("no room")
    assert not list(tmp_path.iterdir())
