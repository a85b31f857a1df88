"""Conversions out of core: what they write, what memory they take, and the proof on the projections alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import liftkit
from liftkit import device
from liftkit.checkpoint.header import TensorEntry, encode_header
from liftkit.checkpoint.model import STEM
from liftkit.conversion import memory, verify
from liftkit.conversion.plan import make_plan
from liftkit.conversion.write import autoencoder_files
from liftkit.options import ConvertOptions
from tests import tiny
from tests.big_models import Cli, convert, manifest, shards

__all__ = ["shards"]


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
    """The bound is 4 x the largest rewritten tensor + 64 MiB beyond interpreter and torch."""
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


@pytest.mark.parametrize("size", [pytest.param(640 << 20, id="640 MB"), pytest.param(20 << 30, id="20 GB")])
@pytest.mark.slow
def test_conversion_and_verification_of_a_checkpoint_beyond_memory(
    size: int, shards: Path, lift_file: Path, tmp_path: Path
) -> None:
    """With holes, so that it takes no disk. What either holds beside its libraries does not grow with it."""
    big_model(shards, size)
    program = f"""
import resource, torch
from pathlib import Path
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel
peak = lambda: 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
torch.set_num_threads(1)
import liftkit
from liftkit.conversion.audit import audit
before = peak()
liftkit.convert({str(shards)!r}, {str(tmp_path / "out")!r}, lift=Path({str(lift_file)!r}), device="cpu",
                proof="projections", shards="link")
found = audit({str(tmp_path / "out")!r}, {str(shards)!r})
print(*(f"{{check.name}} {{len([each for each in check.problems if 'padding' not in each])}}" for check in found.checks))
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    checks, used = done.stdout.splitlines()[-2:]
    # The tensors that make it large are of no class.
    assert checks == "manifest 0 weights 0 components 0 basis 0 lift 0 source 0"
    assert int(used) < 192 << 20


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
