"""Conversions out of core: what they write, what memory they take, and the proof on the projections alone."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import liftkit
from liftkit import device
from liftkit.checkpoint import copying, follow, parts
from liftkit.checkpoint.copying import copy_file, extract_file
from liftkit.checkpoint.follow import Ledger, digest_file
from liftkit.checkpoint.header import TensorEntry, encode_header, read_header
from liftkit.checkpoint.model import STEM, Weights
from liftkit.checkpoint.rewrite import compare_files, rewrite_file, torch_dtype
from liftkit.conversion import memory, verify
from liftkit.conversion.audit import audit
from liftkit.conversion.plan import make_plan
from liftkit.conversion.write import autoencoder_files
from liftkit.errors import LiftkitError, ProofError, UsageError
from liftkit.models import surgery
from liftkit.options import ConvertOptions
from tests import tiny

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def shards(model_folders: dict[str, Path], tmp_path: Path) -> Path:
    """The tiny klein in many shards, in bfloat16."""
    from diffusers import Flux2Transformer2DModel

    folder = tmp_path / "sharded"
    folder.mkdir()
    for path in model_folders["flux2"].iterdir():
        if path.name != "transformer":
            (folder / path.name).symlink_to(path) if path.is_file() else copy_tree(path, folder / path.name)
    (folder / "model_index.json").unlink()
    (folder / "model_index.json").write_bytes((model_folders["flux2"] / "model_index.json").read_bytes())
    model = Flux2Transformer2DModel.from_pretrained(model_folders["flux2"], subfolder="transformer")
    model.to(torch.bfloat16).save_pretrained(folder / "transformer", max_shard_size="30KB")
    return folder


def copy_tree(source: Path, target: Path) -> None:
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())


def convert(model: Path, output: Path, lift: Path, **choices: Any) -> Any:
    return liftkit.convert(str(model), output, **{"lift": lift, "device": "cpu", "proof": "projections", **choices})


def manifest(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): f"blake3:{blake3(path.read_bytes()).hexdigest()}" for path in files}


# ---------------------------------------------------------------------------------- what is written, and how


def test_linked_or_copied_the_bytes_are_the_same(shards: Path, lift_file: Path, tmp_path: Path) -> None:
    for name, choice in (("copied", "copy"), ("linked", "link")):
        convert(shards, tmp_path / name, lift_file, shards=choice)
    assert manifest(tmp_path / "copied") == manifest(tmp_path / "linked")
    source = {path.name: path.stat() for path in (shards / "transformer").glob("*.safetensors")}
    linked = {
        path.name for path in (tmp_path / "linked" / "transformer").glob("*.safetensors") if path.stat().st_nlink > 1
    }
    where = json.loads((shards / "transformer" / f"{STEM}.safetensors.index.json").read_text())["weight_map"]
    changed = {where["x_embedder.weight"], where["proj_out.weight"]}
    assert linked == source.keys() - changed
    assert len(linked) > 1
    for name in linked:
        assert (tmp_path / "linked" / "transformer" / name).stat().st_ino == source[name].st_ino
        assert (tmp_path / "copied" / "transformer" / name).stat().st_nlink == 1
    assert (tmp_path / "linked" / "latent" / "vae" / f"{STEM}.safetensors").stat().st_nlink > 1


def test_where_links_do_not_go_there_are_copies_and_a_note(
    cli: Cli, shards: Path, lift_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.link", refuse)
    choices = ("--lift", lift_file, "--device", "cpu", "--shards", "link", "--proof", "projections")
    code, out, err = cli("convert", shards, "-o", tmp_path / "out", *choices)
    assert code == 0, err
    assert err.count("cannot be linked") == 1
    assert "on the projections" in out
    convert(shards, tmp_path / "copied", lift_file)
    assert manifest(tmp_path / "out") == manifest(tmp_path / "copied")


def test_a_plan_with_links_needs_less_disk(shards: Path, lift_file: Path, tmp_path: Path) -> None:
    plans = [
        make_plan(str(shards), tmp_path / "out", ConvertOptions(lift=lift_file, device="cpu", shards=choice))
        for choice in ("copy", "link")
    ]
    saved = plans[0].needed_bytes - plans[1].needed_bytes
    untouched = [
        header.path.stat().st_size for header in plans[0].weights.headers.values() if plans[0].is_untouched(header)
    ]
    vae = (shards / "vae" / f"{STEM}.safetensors").stat().st_size
    assert saved == sum(untouched) + vae


def test_the_same_bytes_whatever_the_name_the_place_and_the_moment(
    shards: Path, lift_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(shards, tmp_path / "one", lift_file)
    (tmp_path / "deep").mkdir()
    convert(shards, tmp_path / "deep" / "two", lift_file)
    convert(shards, tmp_path / "deep" / "two", lift_file, overwrite=True)
    assert manifest(tmp_path / "one") == manifest(tmp_path / "deep" / "two")
    texts = [path.read_text() for path in (tmp_path / "one").rglob("*") if path.suffix in (".json", ".html", ".md")]
    assert not any(str(tmp_path) in text for text in texts)


def test_the_autoencoder_is_what_its_class_would_save(tmp_path: Path) -> None:
    for lift in (tiny.lift(), tiny.lift(color=liftkit.color.SRGB())):
        model = liftkit.PixelAutoencoder.from_lift(lift, sample_size=64)
        model.save_pretrained(tmp_path)
        config, tensors = autoencoder_files(lift, 64)
        assert config == json.loads((tmp_path / "config.json").read_text())
        saved = load_file(tmp_path / f"{STEM}.safetensors")
        assert saved.keys() == tensors.keys()
        assert all(
            torch.equal(saved[name], tensors[name]) and saved[name].dtype == tensors[name].dtype for name in saved
        )


# ------------------------------------------------------------------------------------------------- memory


def big_model(shards: Path, size: int) -> int:
    """Give the transformer one more shard, of about ``size`` bytes of zeros, as blocks of its own kind; the largest
    rewritten tensor's bytes."""
    index = shards / "transformer" / f"{STEM}.safetensors.index.json"
    content = json.loads(index.read_text())
    name = f"{STEM}-99999-of-99999.safetensors"
    each = 32 << 20
    entries = {
        f"single_transformer_blocks.{n}.padding": TensorEntry("BF16", (each // 2,), (n - 1) * each, n * each)
        for n in range(1, size // each + 1)
    }
    with (shards / "transformer" / name).open("wb") as file:
        lead = encode_header(entries, {"format": "pt"})
        file.write(lead)
        file.truncate(len(lead) + len(entries) * each)
    content["weight_map"] |= dict.fromkeys(entries, name)
    index.write_text(json.dumps(content))
    return tiny.DIM * 32 * 2


@pytest.mark.parametrize(
    ("size", "dtype"),
    [
        pytest.param(160 << 20, "auto", id="160 MB"),
        pytest.param(4 << 30, "auto", marks=pytest.mark.slow, id="4 GB"),
        pytest.param(1 << 30, "float32", marks=pytest.mark.slow, id="1 GB, cast"),
    ],
)
def test_memory_does_not_grow_with_the_model(
    size: int, dtype: str, shards: Path, lift_file: Path, tmp_path: Path
) -> None:
    """The issue's bound: 4 x the largest rewritten tensor + 64 MiB beyond interpreter and torch."""
    largest = big_model(shards, size)
    if dtype != "auto":
        largest = 2 * (32 << 20)
    program = f"""
import resource, sys, torch
from pathlib import Path
peak = lambda: 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
torch.set_num_threads(1)
before = peak()
import liftkit
from liftkit import device
liftkit.convert({str(shards)!r}, {str(tmp_path / "out")!r}, lift=Path({str(lift_file)!r}), device="cpu",
                proof="projections", dtype={dtype!r})
print(peak() - before, sorted({{"diffusers", "transformers", "peft", "accelerate"}} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    used, _, models = done.stdout.strip().partition(" ")
    assert int(used) < 4 * largest + (64 << 20)
    assert models == "[]", "no transformer is built to write one"
    assert sum(path.stat().st_size for path in (tmp_path / "out").rglob("*")) > size


def test_the_proof_is_chosen_by_memory(
    shards: Path, lift_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def planned(**choices: Any) -> Any:
        return make_plan(str(shards), tmp_path / "out", ConvertOptions(lift=lift_file, device="cpu", **choices))

    plan = planned()
    assert plan.proof == "model"
    needed = memory.model_memory(plan.weights)
    numbers = sum(
        tensor.numel() for path in (shards / "transformer").glob("*.safetensors") for tensor in load_file(path).values()
    )
    assert needed == round(5 * numbers) + 10**9
    monkeypatch.setattr(memory, "available_memory", lambda device: needed - 1)
    plan = planned()
    assert plan.proof == "projections"
    assert "GB are free" in plan.reasons["proof"]
    assert [planned(proof=kind).proof for kind in ("model", "projections")] == ["model", "projections"]
    result = liftkit.convert(str(shards), tmp_path / "out", lift=lift_file, device="cpu")
    record = json.loads((tmp_path / "out" / "liftkit.json").read_text())
    assert result.proof.kind == record["proof"]["kind"] == "projections"
    for name in ("alignment.html", "README.md"):
        assert "rojections of both models" in (tmp_path / "out" / name).read_text()


def test_memory_that_does_not_suffice_after_all(
    cli: Cli, shards: Path, lift_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(verify, "_load", full)
    arguments = ("convert", shards, "--lift", lift_file, "--device", "cpu")
    code, _, err = cli(*arguments, "-o", tmp_path / "out")
    assert code == 0
    assert "proving on the projections" in err
    assert json.loads((tmp_path / "out" / "liftkit.json").read_text())["proof"]["kind"] == "projections"
    code, _, err = cli(*arguments, "-o", tmp_path / "other", "--proof", "model")
    assert code == 1
    assert "--proof projections" in err
    assert not (tmp_path / "other").exists()


def test_the_container_s_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "Path", lambda name: tmp_path)
    assert device._container_limit() > 2**60
    for name, text in (
        ("memory.max", "1000"),
        ("memory.current", "900"),
        ("memory.stat", "anon 1\ninactive_file 50\n"),
    ):
        (tmp_path / name).write_text(text + "\n")
    assert device._container_limit() == 150
    assert device.available_memory("cpu") == 150
    (tmp_path / "memory.max").write_text("max\n")
    assert device._container_limit() > 2**60


# ------------------------------------------------------------------------------- the proof on the projections


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_the_two_proofs_agree(
    dtype: str, architecture: str, model_folders: dict[str, Path], lift_file: Path, tmp_path: Path
) -> None:
    on = {
        kind: convert(model_folders[architecture], tmp_path / kind, lift_file, proof=kind, dtype=dtype).proof
        for kind in ("model", "projections")
    }
    assert on["projections"].exact < 1e-5
    assert on["model"].exact < 1e-4
    assert {proof.dtype for proof in on.values()} == {"float32" if dtype == "auto" else "bfloat16"}
    if dtype == "bfloat16":
        assert 1e-4 < on["projections"].stored < 1e-1
    for name in ("transformer", "latent", "lift.safetensors"):
        same = [manifest(tmp_path / kind) for kind in on]
        assert {k: v for k, v in same[0].items() if k.startswith(name)} == {
            k: v for k, v in same[1].items() if k.startswith(name)
        }


def turned(weight: torch.Tensor, basis: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (basis.flip(0) @ weight.reshape(weight.shape[0], -1).double()).reshape(-1, *weight.shape[1:]).to(dtype)


@pytest.mark.parametrize("where", ["product", "order", "scale", "basis"])
def test_wrong_surgery_fails_the_proof_on_the_projections(
    where: str,
    architecture: str,
    model_folders: dict[str, Path],
    lift_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Mistakes that the surgery makes consistently, so that comparing stored tensors with products finds nothing."""
    honest = surgery.token_order
    if where == "product":
        monkeypatch.setattr(surgery, "lift_output", turned)
    elif where == "order":
        monkeypatch.setattr(surgery, "token_order", lambda c, p, order, fold=1: honest(c, p, order, fold).flip(0))
    elif where == "scale":
        monkeypatch.setattr(surgery, "lift_input", lambda w, b, d: 1.01 * w.new_tensor(1.0) * _input(w, b, d))
    else:
        monkeypatch.setattr(surgery, "native_basis", lambda lift, order: lift.basis.double().roll(1, 0))
    with pytest.raises(ProofError, match="the proof failed"):
        convert(model_folders[architecture], tmp_path / "out", lift_file)
    assert not (tmp_path / "out").exists()


_input = surgery.lift_input


def test_blocks_of_a_product_make_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    basis = torch.linalg.qr(torch.randn(48, 16, dtype=torch.float64))[0]
    wide, conv = torch.randn(70, 16), torch.randn(70, 4, 2, 2)
    whole = [surgery.lift_input(each, basis) for each in (wide, conv)] + [surgery.lift_output(wide.T, basis)]
    monkeypatch.setattr(surgery, "ROWS", 32)
    parts = [surgery.lift_input(each, basis) for each in (wide, conv)] + [surgery.lift_output(wide.T, basis)]
    assert [each.shape for each in parts] == [(70, 48), (70, 12, 2, 2), (48, 70)]
    for one, other in zip(whole, parts):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
    assert surgery.lift_output(torch.randn(16), basis, torch.bfloat16).dtype == torch.bfloat16
    torch.testing.assert_close(whole[0].double(), wide.double() @ basis.T, rtol=1e-6, atol=1e-7)


def spoil(shards: Path, name: str, place: Any, value: float) -> str:
    """Put a value somewhere into a tensor of a sharded transformer; the shard's name."""
    index = json.loads((shards / "transformer" / f"{STEM}.safetensors.index.json").read_text())
    shard: str = index["weight_map"][name]
    tensors = load_file(shards / "transformer" / shard)
    tensors[name][place] = value
    save_file(tensors, shards / "transformer" / shard, {"format": "pt"})
    return shard


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["x_embedder.weight", "proj_out.weight"])
def test_projections_that_are_not_finite_are_named_before_anything_is_done(
    name: str, value: float, cli: Cli, shards: Path, lift_file: Path, tmp_path: Path
) -> None:
    where = spoil(shards, name, (3, 2), value)
    code, _, err = cli("convert", shards, "--lift", lift_file, "-o", tmp_path / "out", "--dry-run")
    assert code == 2
    assert f"{where}: tensor '{name}': 1 of" in err
    assert "NaN or infinite" in err


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_other_tensors_that_are_not_finite_are_found_on_the_way(
    value: float, cli: Cli, shards: Path, lift_file: Path, tmp_path: Path
) -> None:
    name = "transformer_blocks.0.ff.linear_in.weight"
    where = spoil(shards, name, (-1, -1), value)
    code, _, err = cli("convert", shards, "--lift", lift_file, "-o", tmp_path / "out", "--proof", "projections")
    assert code == 2
    assert f"transformer/{where}: tensor '{name}' holds NaN or infinite numbers" in err
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16", "F8_E5M2", "F8_E4M3"])
def test_every_pattern_of_bits_is_known_for_finite_or_not(dtype: str) -> None:
    kind = torch_dtype(dtype)
    size = kind.itemsize
    generator = torch.Generator().manual_seed(0)
    raw = torch.randint(0, 256, (4096, size), dtype=torch.uint8, generator=generator)
    # Random exponents are rarely the highest: set all of their bits in half of the elements.
    raw[::2, -2:] |= torch.tensor([0xF0, 0x7F], dtype=torch.uint8)[-min(size, 2) :]
    numbers = raw.flatten().view(kind)
    expected = numbers.double().isfinite()
    assert 0 < expected.sum() < len(expected)
    data = raw.numpy().tobytes()
    found = [parts.is_finite(memoryview(data)[i * size : (i + 1) * size], dtype) for i in range(len(expected))]
    assert found == expected.tolist()
    kept = raw[expected].numpy().tobytes()
    assert parts.is_finite(memoryview(kept), dtype)
    assert parts.is_finite(memoryview(data), "I8")


@pytest.mark.parametrize(
    ("name", "said"), [("norm_out.linear.weight", "holds 1e+10"), ("x_embedder.weight", "can hold")]
)
def test_numbers_that_the_wanted_dtype_cannot_hold_are_named(
    name: str, said: str, cli: Cli, shards: Path, lift_file: Path, tmp_path: Path
) -> None:
    spoil(shards, name, 3, 1e10)
    arguments = (
        "convert",
        shards,
        "--lift",
        lift_file,
        "-o",
        tmp_path / "out",
        "--proof",
        "projections",
        "--device",
        "cpu",
    )
    code, _, err = cli(*arguments, "--dtype", "float16")
    assert code == 2
    assert f"tensor '{name}'" in err
    assert said in err
    assert "bfloat16 or float32" in err
    assert not (tmp_path / "out").exists()
    assert cli(*arguments, "--dtype", "float32")[0] == 0


# ----------------------------------------------------------------------------- reading back beside the writing


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
