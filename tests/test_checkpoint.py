"""Safetensors headers and rewriting: bytes in, bytes out, and files that lie."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, load_file, save, save_file

from liftkit.checkpoint.files import atomic_file, write_text
from liftkit.checkpoint.folder import atomic_folder
from liftkit.checkpoint.header import encode_header, read_header
from liftkit.checkpoint.model import read_weights
from liftkit.checkpoint.rewrite import copy_range, read_tensor, rewrite_file
from liftkit.errors import LiftkitError, UsageError

TENSORS = {
    "a": torch.arange(12.0).reshape(3, 4),
    "b": torch.arange(5).to(torch.int64),
    "c": torch.randn(2, 2).to(torch.bfloat16),
    "empty": torch.zeros(0, 3),
    "scalar": torch.tensor(2.0),
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source.safetensors"
    save_file(TENSORS, path, {"format": "pt", "note": "kept"})
    return path


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


def test_rewriting_nothing_keeps_every_byte(source: Path, tmp_path: Path) -> None:
    rewrite_file(read_header(source), tmp_path / "same.safetensors", {})
    written = read_header(tmp_path / "same.safetensors")
    assert written.tensors == read_header(source).tensors
    assert written.metadata["note"] == "kept"
    assert (tmp_path / "same.safetensors").read_bytes()[written.payload :] == source.read_bytes()[
        read_header(source).payload :
    ]


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
    with source.open("rb") as file, (tmp_path / "out").open("wb") as target, pytest.raises(OSError, match="shorter"):
        copy_range(file, 0, source.stat().st_size + 1, target, lambda count: None)


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
        ({"a": {**A, "shape": [2**62, 2**62]}}, b"\0" * 8, "should take"),
        ({"a": {**A, "dtype": "F33"}}, b"\0" * 8, "no valid dtype"),
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
    ("weight_map", "expected"),
    [
        ({"a": "one.safetensors", "b": "../two.safetensors"}, "no plain name"),
        ({"a": "one.safetensors", "b": "/etc/passwd"}, "no plain name"),
        ({"a": "one.safetensors", "b": "two\n.safetensors"}, "no plain name"),
        ({"a": "one.safetensors"}, None),
        ({"a": "one.safetensors", "b": "one.safetensors"}, "tensor 'b' should be in one"),
        ({"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}, "'c' should be in two.safetensors"),
        ({"a": "one.safetensors", "b": "three.safetensors"}, "cannot be read"),
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


def test_files_and_folders_appear_whole_or_not_at_all(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "old")
    with pytest.raises(RuntimeError), atomic_file(tmp_path / "a") as file:
        file.write(b"half")
        raise RuntimeError
    assert (tmp_path / "a").read_text() == "old"
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "out") as building:
        (building / "x").write_text("half")
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_disk_that_refuses(tmp_path: Path) -> None:
    def write() -> None:
        with atomic_folder(tmp_path / "out"):
            raise OSError(28, "No space left on device", "big.safetensors")

    with pytest.raises(LiftkitError, match=r"big.safetensors: No space left on device; nothing was left behind"):
        write()
    assert not list(tmp_path.iterdir())
