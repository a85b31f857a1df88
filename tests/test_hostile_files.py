"""Nothing trusted: sources that change or lie, and headers made to hurt."""

from __future__ import annotations

import json
import os
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

import liftkit
from liftkit.checkpoint import files
from liftkit.checkpoint.header import MAX_HEADER, read_header
from liftkit.checkpoint.model import STEM, ModelFolder, find_model, read_json, read_weights
from liftkit.conversion.execute import execute
from liftkit.conversion.plan import make_plan
from liftkit.errors import LiftkitError, UsageError
from liftkit.options import ConvertOptions
from liftkit.progress import Silent
from tests.running import is_complete

Cli = Callable[..., tuple[int, str, str]]
WEIGHTS = f"transformer/{STEM}.safetensors"
CHOICES: dict[str, Any] = {"device": "cpu", "proof": "projections"}


# ------------------------------------------------------------------------------ sources that change or lie


@pytest.mark.parametrize("name", [WEIGHTS, f"vae/{STEM}.safetensors", "vae/config.json", "model_index.json", "LICENSE"])
@pytest.mark.parametrize("how", ["touched", "replaced"])
def test_a_source_that_changes_during_the_work(name: str, how: str, klein: Path, lift_file: Path, room: Path) -> None:
    (klein / "LICENSE").write_text("terms")
    plan = make_plan(str(klein), room / "out", ConvertOptions(lift=lift_file, **CHOICES))

    class Meanwhile(Silent):
        def stage(self, title: str, total: float | None, unit: str) -> Any:
            if title.startswith("prove"):
                if how == "touched":
                    os.utime(klein / name, ns=(7, 7))
                else:
                    (klein / "new").write_bytes((klein / name).read_bytes())
                    (klein / "new").replace(klein / name)
            return super().stage(title, total, unit)

    with pytest.raises(LiftkitError, match=rf"{name}: changed since it was looked at first"):
        execute(plan, Meanwhile())
    assert not list(room.iterdir())


def test_a_source_that_changes_between_plan_and_work(klein: Path, lift_file: Path, room: Path) -> None:
    for change in ("shrunk", "gone"):
        plan = make_plan(str(klein), room / "out", ConvertOptions(lift=lift_file, **CHOICES))
        if change == "shrunk":
            content = (klein / WEIGHTS).read_bytes()
            (klein / WEIGHTS).write_bytes(content[:-100])
        else:
            (klein / "vae" / "config.json").unlink()
        with pytest.raises(LiftkitError, match=r"changed since|truncated|cannot be read|went away"):
            execute(plan, Silent())
        assert not list(room.iterdir())
        (klein / WEIGHTS).write_bytes(content)


def add_link_out(model: Path) -> str:
    (model.parent / "secret.txt").write_text("secret")
    (model / "vae" / "notes.txt").symlink_to(model.parent / "secret.txt")
    return r"notes.txt: a link out of the model folder, to .*secret.txt"


def add_license_out(model: Path) -> str:
    (model.parent / "secret.txt").write_text("secret")
    (model / "LICENSE.txt").symlink_to(model.parent / "secret.txt")
    return r"LICENSE.txt: a link out of the model folder"


def add_weights_out(model: Path) -> str:
    (model / WEIGHTS).rename(model.parent / "elsewhere.safetensors")
    (model / WEIGHTS).symlink_to(model.parent / "elsewhere.safetensors")
    return r"a link out of the model folder, to .*elsewhere.safetensors"


def add_folder_out(model: Path) -> str:
    (model.parent / "other").mkdir()
    (model / "vae" / "more").symlink_to(model.parent / "other")
    return r"more: a link out of the model folder"


def add_component_out(model: Path) -> str:
    (model / "vae").rename(model.parent / "vae")
    (model / "vae").symlink_to(model.parent / "vae")
    return r"klein/vae: a link out of the model folder"


def add_loop(model: Path) -> str:
    (model / "vae" / "again").symlink_to(model / "vae")
    return r"again: a link that leads round in a circle"


def add_endless_link(model: Path) -> str:
    (model / "vae" / "one").symlink_to("two")
    (model / "vae" / "two").symlink_to("one")
    return r"one: leads nowhere \(Too many levels of symbolic links\)"


def add_dangling_link(model: Path) -> str:
    (model / "vae" / "one").symlink_to("none")
    return r"one: leads nowhere \(No such file"


def add_pipe(model: Path) -> str:
    (model / WEIGHTS).unlink()
    os.mkfifo(model / WEIGHTS)
    return r"safetensors: neither a file nor a folder"


def add_config_pipe(model: Path) -> str:
    (model / "model_index.json").unlink()
    os.mkfifo(model / "model_index.json")
    return r"model_index.json is missing|no regular file"


def add_device(model: Path) -> str:
    (model / WEIGHTS).unlink()
    (model / WEIGHTS).symlink_to("/dev/zero")
    return r"a link out of the model folder|no regular file"


def add_newline(model: Path) -> str:
    (model / "vae" / "a\nb.txt").write_text("")
    return r"the name 'a\\nb.txt' does not print"


def add_bytes_that_are_no_text(model: Path) -> str:
    Path(os.fsdecode(os.fsencode(model / "vae") + b"/\xff.txt")).write_text("")
    return r"the name '\\udcff.txt' does not print"


def add_component_above(model: Path) -> str:
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps({**index, "../other": ["diffusers", "X"]}))
    return r"model_index.json: '../other' is no plain name of a component"


def add_ambiguous_index(model: Path) -> str:
    text = (model / "model_index.json").read_text()
    (model / "model_index.json").write_text(text.replace("{", '{"vae": ["diffusers", "AutoencoderKL"],', 1))
    return r"model_index.json: no valid JSON \(the key 'vae' occurs twice\)"


LIES = [value for name, value in sorted(globals().items()) if name.startswith("add_")]


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: lie.__name__.removeprefix("add_"))
def test_folders_that_lie(lie: Callable[[Path], str], klein: Path, lift_file: Path, room: Path) -> None:
    expected = lie(klein)
    with pytest.raises(UsageError, match=expected):
        liftkit.convert(str(klein), room / "out", lift=lift_file, **CHOICES)
    assert not list(room.iterdir())


def test_the_hub_s_cache_is_at_home(klein: Path, lift_file: Path, room: Path) -> None:
    """Its snapshots are links into its blobs; links within a folder are followed too."""
    entry = klein.parent / "models--org--klein"
    (entry / "blobs").mkdir(parents=True)
    for number, path in enumerate(sorted(path for path in klein.rglob("*") if path.is_file())):
        place = entry / "snapshots" / "abc" / path.relative_to(klein)
        place.parent.mkdir(parents=True, exist_ok=True)
        path.rename(entry / "blobs" / str(number))
        place.symlink_to(os.path.relpath(entry / "blobs" / str(number), place.parent))
    snapshot = entry / "snapshots" / "abc"
    assert ModelFolder(snapshot, "org/klein", {}).home == entry
    for choice in ("copy", "link"):
        liftkit.convert(str(snapshot), room / choice, lift=lift_file, shards=choice, **CHOICES)
        assert is_complete(room / choice)
        assert not any(path.is_symlink() for path in (room / choice).rglob("*"))
    (snapshot / "vae" / "inner.json").symlink_to("config.json")
    liftkit.convert(str(snapshot), room / "inner", lift=lift_file, **CHOICES)
    assert (room / "inner" / "latent" / "vae" / "inner.json").is_file()


def test_pickles_stay_behind(klein: Path, lift_file: Path, room: Path) -> None:
    for name in (f"{STEM}.bin", "old.ckpt", "x.pt"):
        (klein / "vae" / name).write_bytes(b"\x80\x02")
    liftkit.convert(str(klein), room / "out", lift=lift_file, **CHOICES)
    assert {path.suffix for path in (room / "out" / "latent" / "vae").iterdir()} == {".json", ".safetensors"}


def test_an_index_with_a_key_twice_and_one_of_gigabytes(tmp_path: Path) -> None:
    index = tmp_path / f"{STEM}.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "one.safetensors", "a": "two.safetensors"}}')
    with pytest.raises(UsageError, match="the key 'a' occurs twice"):
        read_weights(tmp_path)
    with index.open("wb") as file:
        file.truncate(10**11)
    with pytest.raises(UsageError, match="100000000000 bytes of JSON"):
        read_json(index)
    with pytest.raises(UsageError, match="no valid JSON"):
        index.write_bytes(b'{"\xff": 1}')
        read_json(index)


def test_names_of_files_that_are_no_names(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        find_model(f"{tmp_path}/a\nb")
    with pytest.raises(UsageError, match="cannot be read"):
        read_json(tmp_path / "a\0b")


# ---------------------------------------------------------------------------------- headers that lie, fuzzed


def parse(path: Path) -> None:
    """A header or a UsageError of one line; what is read stays in the file, whatever it says."""
    try:
        header = read_header(path)
    except UsageError as error:
        assert str(error).startswith(str(path))
        assert "\n" not in str(error)
        return
    size = path.stat().st_size
    position = header.payload
    for entry in sorted(header.tensors.values(), key=lambda entry: (entry.start, entry.end)):
        assert header.payload + entry.start == position
        position = header.payload + entry.end
    assert position == size


VALID = save({"a": torch.zeros(4), "b": torch.ones(2, 3).bfloat16(), "c": torch.arange(3)}, {"format": "pt"})
LENGTH = int.from_bytes(VALID[:8], "little")
PIECE = st.one_of(
    st.binary(max_size=6),
    st.sampled_from(
        [b"{", b"}", b'"', b"\\ud800", b"\\u0000", b"NaN", b"1e999", b"-1", b"[", b"9" * 5000, b"null", b",", b":"]
    ),
)
MUTATION = st.tuples(
    st.sampled_from(["insert", "delete", "replace", "flip", "repeat"]),
    st.integers(0, len(VALID) + 8),
    PIECE,
    st.booleans(),
)
FUZZ = settings(max_examples=300, deadline=1000, suppress_health_check=[HealthCheck.function_scoped_fixture])


def mutate(raw: bytes, how: str, place: int, piece: bytes) -> bytes:
    if how == "insert":
        return raw[:place] + piece + raw[place:]
    if how == "delete":
        return raw[:place] + raw[place + len(piece) :]
    if how == "replace":
        return raw[:place] + piece + raw[place + len(piece) :]
    if how == "flip" and place < len(raw):
        return raw[:place] + bytes([raw[place] ^ (1 << len(piece) % 8)]) + raw[place + 1 :]
    return raw + raw[:place]


@FUZZ
@given(st.lists(MUTATION, min_size=1, max_size=4))
def test_mutations_of_a_valid_file(tmp_path: Path, mutations: list[tuple[str, int, bytes, bool]]) -> None:
    raw = VALID
    for how, place, piece, honest in mutations:
        raw = mutate(raw, how, place, piece)
        if honest and len(raw) > 8:
            # A length that agrees again, so that what is inside is read.
            raw = max(LENGTH + len(raw) - len(VALID), 0).to_bytes(8, "little") + raw[8:]
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw)
    tracemalloc.start()
    try:
        parse(path)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


NUMBER = st.one_of(st.integers(-2, 40), st.sampled_from([2**31, 2**48, 2**63, 2**64, 10**4000, True, None, 1.5, "1"]))
VALUE = st.recursive(
    st.one_of(NUMBER, st.text(max_size=3)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=6,
)
TENSOR = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.one_of(st.sampled_from(["F32", "BF16", "I64", "F4", "F8_E4M3", "F33", ""]), VALUE),
        "shape": st.one_of(st.lists(NUMBER, max_size=5), VALUE),
        "data_offsets": st.one_of(st.lists(NUMBER, min_size=2, max_size=2), VALUE),
        "extra": VALUE,
    },
)
NAME = st.one_of(st.text(max_size=5), st.sampled_from(["__metadata__", "../x", "a\nb", ""]))


@FUZZ
@given(st.dictionaries(NAME, st.one_of(TENSOR, VALUE), max_size=4), st.integers(0, 200))
def test_headers_of_any_json(tmp_path: Path, content: dict[str, Any], payload: int) -> None:
    raw = json.dumps(content).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(payload))
    parse(path)


@pytest.mark.parametrize("length", [MAX_HEADER + 1, 100_000_000, 2**40, 2**64 - 1])
def test_the_memory_for_a_header_is_not_what_it_says(length: int, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write(length.to_bytes(8, "little") + b'{"a": ')
        file.truncate(min(8 + length + 100, 2**42))
    tracemalloc.start()
    try:
        with pytest.raises(UsageError, match=rf"its header would take {length} bytes, {MAX_HEADER} at most"):
            read_header(path)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "header",
    [
        b'{"a":' * 200_000,
        b"[" * 10**6,
        b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,0]}}',
        b'{"a":{"dtype":"F32","shape":[' + b"281474976710656," * 50_000 + b'1],"data_offsets":[0,0]}}',
        b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"\\ud800":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}',
        '{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'.encode("utf-16-le"),
        b'{"a":{"dtype":["F32"],"shape":[0],"data_offsets":[0,0]}}',
        b'{"__metadata__":{"x":"\\udfff"}}',
    ],
    ids=["nested", "no object", "digits", "dimensions", "surrogate", "utf-16", "dtype", "metadata"],
)
def test_headers_made_to_hurt(header: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    begun = time.perf_counter()
    with pytest.raises(UsageError):
        read_header(path)
    assert time.perf_counter() - begun < 5


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n", "git-lfs pointer"),
        (b"\x80\x04\x95" + bytes(100), "a pickle"),
        (b"PK\x03\x04" + bytes(100), "a pickle"),
        (b"", "or truncated (0 bytes"),
        (b"\x01", "or truncated (1 bytes"),
        (VALID[:40], "truncated"),
        (VALID[:-1], "truncated"),
        (VALID + b"\0", "bytes follow the last tensor"),
    ],
)
def test_files_that_are_something_else(content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        read_header(path)
    assert said in str(caught.value)


def test_what_is_no_file_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "zero.safetensors").symlink_to("/dev/zero")
    (tmp_path / "loop.safetensors").symlink_to("loop.safetensors")
    for name, said in (
        ("pipe", "no regular file"),
        ("folder", "no regular file"),
        ("zero", "no regular file"),
        ("loop", "Too many"),
    ):
        with pytest.raises(UsageError, match=said):
            read_header(tmp_path / f"{name}.safetensors")
    with pytest.raises(UsageError, match="no regular file"):
        files.read_safetensors(tmp_path / "pipe.safetensors")
