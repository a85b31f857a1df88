"""Safetensors headers and rewriting: bytes in, bytes out, and files that lie."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from shutil import copyfile

import huggingface_hub
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load, load_file, save, save_file

from liftkit.checkpoint import rewrite
from liftkit.checkpoint.copying import copy_range
from liftkit.checkpoint.files import atomic_file, write_safetensors, write_text
from liftkit.checkpoint.folder import SUFFIX, atomic_folder, check_target
from liftkit.checkpoint.header import DTYPE_BITS, encode_header, laid_out, read_header
from liftkit.checkpoint.model import STEM, ModelFolder, find_model, read_weights
from liftkit.checkpoint.rewrite import read_tensor, rewrite_file
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


def test_an_error_of_a_library_is_one_line(tmp_path: Path) -> None:
    """OSErrors of diffusers and the Hub have no strerror, and several lines."""
    with pytest.raises(LiftkitError, match=r"first line second line; nothing"), atomic_folder(tmp_path / "out"):
        raise OSError("first line\n\n  second line")
    with pytest.raises(LiftkitError, match=r"\(no room\); nothing"), atomic_file(tmp_path / "a"):
        raise OSError("no room")
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------- replacing an output


def fill(folder: Path, *names: str) -> Path:
    folder.mkdir()
    for name in names:
        (folder / name).write_text("old")
    return folder


def make(target: Path, **choices: bool) -> None:
    with atomic_folder(target, **choices) as building:
        (building / "new").write_text("new")


def content(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def dead_process() -> int:
    gone = [sys.executable, "-c", "import os; print(os.getpid())"]
    return int(subprocess.run(gone, capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize("names", [(), ("liftkit.json", "old")])
def test_liftkit_s_own_folders_and_empty_ones_are_replaced_when_told(names: tuple[str, ...], tmp_path: Path) -> None:
    target = fill(tmp_path / "out", *names)
    with pytest.raises(UsageError, match="exists already"):
        make(target)
    assert content(target) == sorted(names)
    make(target, overwrite=True)
    assert content(target) == ["new"]
    assert content(tmp_path) == ["out"]


def test_other_folders_are_never_replaced(tmp_path: Path) -> None:
    target = fill(tmp_path / "out", "thesis.tex")
    for act in (make, check_target):
        with pytest.raises(UsageError, match=r"no liftkit.json, .*; remove it or choose another output"):
            act(target, overwrite=True)
    assert content(target) == ["thesis.tex"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        make(tmp_path / "file", overwrite=True)


def test_a_folder_that_appears_during_the_work_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="exists already"), atomic_folder(tmp_path / "out"):
        fill(tmp_path / "out", "precious")
    assert content(tmp_path / "out") == ["precious"]
    assert content(tmp_path) == ["out"]


@pytest.mark.parametrize("crash", [OSError(5, "Input/output error"), KeyboardInterrupt()])
def test_a_failed_replacement_puts_the_old_folder_back(
    crash: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, rename, done = fill(tmp_path / "out", "liftkit.json"), os.rename, []

    def fragile(source: Path, destination: Path) -> None:
        done.append(source)
        if len(done) == 2:
            raise crash
        rename(source, destination)

    monkeypatch.setattr("os.rename", fragile)
    with pytest.raises((LiftkitError, KeyboardInterrupt)):
        make(target, overwrite=True)
    assert len(done) == 3
    assert content(target) == ["liftkit.json"]
    assert content(tmp_path) == ["out"]


def test_a_run_killed_between_the_renames_loses_nothing(tmp_path: Path) -> None:
    target = fill(tmp_path / "out", "liftkit.json")
    program = f"""
import os
from pathlib import Path
from liftkit.checkpoint.folder import atomic_folder
rename = os.rename
def kill(source, destination):
    rename(source, destination)
    os._exit(9)
os.rename = kill
with atomic_folder(Path({str(target)!r}), overwrite=True):
    pass
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 9
    assert not target.exists()
    assert len(content(tmp_path)) == 3, "two folders and the lock that died with the run"
    with pytest.raises(UsageError, match="exists already"):
        check_target(target, overwrite=False)
    assert content(target) == ["liftkit.json"]
    assert content(tmp_path) == ["out"]


def test_what_killed_runs_left_is_swept(tmp_path: Path) -> None:
    gone, target = dead_process(), fill(tmp_path / "out", "liftkit.json")
    fill(tmp_path / f".out.{gone}{SUFFIX}", "half")
    fill(tmp_path / f".out.{gone}-0a1b.old{SUFFIX}", "older")
    # Nobody holds these, whatever processes have those numbers now.
    fill(tmp_path / f".out.{os.getpid()}-0a1b{SUFFIX}", "half")
    fill(tmp_path / f".out.{os.getppid()}-0a1b{SUFFIX}", "half")
    kept = fill(tmp_path / f".out.{gone}.{os.getppid()}{SUFFIX}").name
    make(target, overwrite=True)
    assert content(target) == ["new"]
    assert content(tmp_path) == sorted([kept, "out"]), "another folder's leftover is not ours"


def test_a_folder_that_a_run_holds_is_left_alone(tmp_path: Path) -> None:
    target = fill(tmp_path / "out", "liftkit.json")
    with atomic_folder(target, overwrite=True) as building:
        (building / "new").write_text("new")
        for act in (make, check_target):
            with pytest.raises(UsageError, match=rf"another run \(process {os.getpid()}\) is making it"):
                act(target, overwrite=True)
        make(tmp_path / "other")
    assert content(target) == ["new"]
    assert content(tmp_path) == ["other", "out"]


@pytest.mark.parametrize("known", [True, False])
def test_without_locks_process_numbers_have_to_do(known: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*arguments: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("liftkit.checkpoint.lock.fcntl", None) if known else None
    monkeypatch.setattr("fcntl.flock", unsupported)
    fill(tmp_path / f".out.{dead_process()}-0a{SUFFIX}", "half")
    make(tmp_path / "out")
    assert content(tmp_path) == ["out"]
    fill(tmp_path / f".out.{os.getppid()}-0a{SUFFIX}", "half")
    with pytest.raises(UsageError, match=rf"process {os.getppid()}\) is making it"):
        make(tmp_path / "out", overwrite=True)


def test_a_link_stays_and_the_folder_behind_it_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    fill(tmp_path / "disk" / "real", "liftkit.json")
    (tmp_path / "link").symlink_to(Path("disk") / "real")
    make(tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert content(tmp_path / "disk" / "real") == ["new"]
    (tmp_path / "dangling").symlink_to(Path("disk") / "later")
    make(tmp_path / "dangling")
    assert content(tmp_path / "disk") == ["later", "real"]
    assert content(tmp_path) == ["dangling", "disk", "link"]


def test_the_working_folder_as_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = fill(tmp_path / "out")
    monkeypatch.chdir(target)
    make(Path("."), overwrite=True)
    assert content(target) == ["new"]
    assert content(tmp_path) == ["out"]


# --------------------------------------------------------------------------- variants, names, the Hub


def weigh(folder: Path, *names: str, shard: str = "") -> Path:
    """Files of one tensor each, called ``a``, and for an index the shard that it names."""
    for name in names:
        if name.endswith(".json"):
            (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": {"a": shard}}))
        else:
            save_file({"a": torch.zeros(2)}, folder / name)
    return folder


INDEX, SINGLE, VARIANT = (f"{STEM}{end}" for end in (".safetensors.index.json", ".safetensors", ".fp16.safetensors"))
VARIANT_INDEX, SHARD = f"{STEM}.safetensors.index.fp16.json", f"{STEM}-00001-of-00001.safetensors"
VARIANT_SHARD = f"{STEM}.fp16-00001-of-00001.safetensors"


@pytest.mark.parametrize(
    ("names", "shard", "expected"),
    [
        ((SINGLE,), "", (SINGLE, False, None)),
        ((SINGLE, VARIANT), "", (SINGLE, False, None)),
        ((INDEX, SHARD), SHARD, (SHARD, True, None)),
        ((INDEX, SHARD, SINGLE), SHARD, (SHARD, True, None)),
        ((INDEX, SHARD, VARIANT_INDEX, VARIANT_SHARD), SHARD, (SHARD, True, None)),
        ((SINGLE, VARIANT_INDEX, VARIANT_SHARD), VARIANT_SHARD, (SINGLE, False, None)),
        ((VARIANT,), "", (VARIANT, False, "fp16")),
        ((VARIANT_INDEX, VARIANT_SHARD), VARIANT_SHARD, (VARIANT_SHARD, True, "fp16")),
        ((VARIANT_INDEX, VARIANT_SHARD, VARIANT), VARIANT_SHARD, (VARIANT_SHARD, True, "fp16")),
    ],
)
def test_which_files_are_the_weights(
    names: tuple[str, ...], shard: str, expected: tuple[str, bool, str | None], tmp_path: Path
) -> None:
    weights = read_weights(weigh(tmp_path, *names, shard=shard))
    assert ([*weights.headers], weights.sharded, weights.variant) == ([expected[0]], *expected[1:])
    assert torch.equal(weights.read("a"), torch.zeros(2))
    assert weights.read("b") is None


def test_two_variants_leave_no_choice(tmp_path: Path) -> None:
    weigh(tmp_path, VARIANT, f"{STEM}.bf16.safetensors")
    with pytest.raises(UsageError, match="several variants"):
        read_weights(tmp_path)
    with pytest.raises(UsageError, match="nor an index"):
        read_weights(weigh(Path(tempfile.mkdtemp(dir=tmp_path)), VARIANT_SHARD, SHARD))


def test_a_model_s_name_holds_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "klein")
    (tmp_path / "klein" / "model_index.json").write_text('{"_class_name": "Flux2KleinPipeline"}')
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path / "klein")
    assert {find_model(name).name for name in ("~/klein", ".", "../klein", str(tmp_path / "klein"))} == {"klein"}
    assert ModelFolder(tmp_path, "org/name", {}).name == "org/name"
    with pytest.raises(UsageError, match="no such folder"):
        find_model("~nobody-of-this-name/klein")


@pytest.mark.parametrize(
    ("limit", "others", "expected"),
    [
        (12, {}, 12),
        (77, {"tokenizer_2": ["transformers", "T5TokenizerFast"]}, None),
        (77, {"tokenizer_2": [None, None]}, 77),
        (512, {}, None),
        (10**30, {}, None),
        (1e30, {}, None),
        (None, {}, None),
        ("12", {}, None),
    ],
)
def test_text_length(limit: object, others: dict[str, object], expected: int | None, tmp_path: Path) -> None:
    folder = ModelFolder(tmp_path, "m", {"tokenizer": ["transformers", "Qwen2Tokenizer"], **others})
    assert folder.text_length() is None
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps({"model_max_length": limit}))
    assert folder.text_length() == expected


@pytest.mark.parametrize(("size", "expected"), [(512, 512), ([768, 512], 768), (None, 1024), (..., 1024)])
def test_image_size(size: object, expected: int, tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(json.dumps({} if size is ... else {"sample_size": size}))
    assert ModelFolder(tmp_path, "m", {"vae": ["diffusers", "AutoencoderKL"]}).image_size() == expected


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], set[str]]:
    """A Hub with one repository; tells which files have been fetched."""
    files = (
        "transformer/config.json",
        "transformer/x.safetensors",
        "vae/config.json",
        "vae/x.safetensors",
        "vae/x.bin",
    )
    store, cache = tmp_path / "store", tmp_path / "cache"
    for name in (*files, "whole.safetensors", "LICENSE.md", "README.md", "_extra/a.json", "safety/x.safetensors"):
        (store / name).parent.mkdir(parents=True, exist_ok=True)
        (store / name).write_text("{}")
    parts = {"transformer": ["diffusers", "AutoModel"], "vae": ["diffusers", "AutoencoderKL"]}
    parts |= {"safety": [None, None], "_extra": ["a", "b"]}
    (store / "model_index.json").write_text(json.dumps({"_class_name": "Flux2KleinPipeline", **parts}))

    def snapshot_download(model: str, allow_patterns: list[str]) -> str:
        for path in (path for path in store.rglob("*") if path.is_file()):
            name = path.relative_to(store).as_posix()
            if any(fnmatch(name, pattern) for pattern in allow_patterns):
                (cache / name).parent.mkdir(parents=True, exist_ok=True)
                copyfile(path, cache / name)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return lambda: {path.relative_to(cache).as_posix() for path in cache.rglob("*") if path.is_file()}


def test_configs_are_fetched_and_checked_before_weights(hub: Callable[[], set[str]]) -> None:
    def refuse(folder: ModelFolder) -> None:
        assert folder.class_of("transformer") == "AutoModel"
        assert folder.config("vae") == {"_class_name": "AutoencoderKL"}
        raise UsageError("will not do")

    with pytest.raises(UsageError, match="will not do"):
        find_model("org/name", refuse)
    assert hub() == {"model_index.json", "transformer/config.json", "vae/config.json"}
    assert find_model("org/name").name == "org/name"
    whole = {"transformer/x.safetensors", "vae/x.safetensors", "README.md", "LICENSE.md"}
    assert hub() == whole | {"model_index.json", "transformer/config.json", "vae/config.json"}


@pytest.mark.parametrize("kind", ["HTTPError", "EntryNotFoundError", "HFValidationError", "OfflineModeIsEnabled"])
def test_errors_of_the_hub_are_one_line_with_all_their_advice(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(model: str, **choices: object) -> str:
        raise getattr(huggingface_hub.errors, kind)("401 Client Error.\n\nAccess is restricted. Please log in.")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(UsageError, match=r"401 Client Error. Access is restricted. Please log in.\)$"):
        find_model("org/name")
