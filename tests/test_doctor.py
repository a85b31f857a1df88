"""``liftkit doctor``: what a machine has, what it lacks, and what is nobody's business."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from liftkit import environment
from liftkit.cli.answers import ALWAYS, KEYS

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def requiring(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    """As if liftkit's metadata asked for these packages."""
    monkeypatch.setattr(environment.metadata, "requires", lambda name: list(lines))


def test_a_machine_that_has_everything(cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch

    requiring(monkeypatch, "torch>=2.6", "diffusers>=0.42", 'lpips>=0.1.4; extra == "lpips"')
    code, out, err = cli("doctor")
    assert code == 0
    assert err == "doctor: looking at this machine ...\n"
    said = {" ".join(line.split()) for line in out.splitlines()}
    assert f"torch {torch.__version__}" in said
    assert "--device auto cpu" in said or torch.cuda.is_available()
    assert {"Versions", "Optional", "Devices", "Machine", "liftkit has all that it needs"} <= said
    assert not list(tmp_path.iterdir())


def test_its_answer_has_the_keys_that_are_documented(cli: Cli) -> None:
    code, out, _ = cli("doctor", "--json", "--quiet")
    answer = json.loads(out)
    assert answer.keys() - ALWAYS.keys() == KEYS["doctor"].keys()
    assert answer["ok"] == (code == 0) == (not answer["problems"])
    assert 0 < answer["memory"]["available"] <= answer["memory"]["total"]
    assert answer["devices"][-1]["device"] == "cpu"
    assert 0 < answer["disk"]["here"]["free"] <= answer["disk"]["here"]["total"]
    assert 1 <= answer["threads"]["usable"] <= answer["threads"]["cpus"]
    assert answer["hub"]["offline"]


def test_what_is_missing_or_too_old_is_named_with_what_to_do(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    requiring(monkeypatch, "torch>=99", "nonesuch>=1,<2", "numpy")
    code, out, err = cli("--json", "doctor")
    assert code == 1
    answer = json.loads(out)
    assert answer["packages"]["nonesuch"] is None
    (old,) = (line for line in answer["problems"] if line.startswith("torch"))
    assert re.fullmatch(r"torch: 2\.\S+ is installed, needed >=99; pip install 'torch>=99'", old)
    assert "nonesuch: not installed, needed >=1,<2; pip install 'nonesuch>=1,<2'" in answer["problems"]
    assert len(answer["problems"]) == 2
    assert answer["error"].splitlines() == answer["problems"]
    assert all(f"error: {line}" in err for line in answer["problems"])
    # The rest is told all the same.
    assert answer["memory"]


def test_a_torch_that_is_there_and_does_not_load(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> Any:
        raise OSError("libcudart.so.13: cannot open shared object file\nNo such file")

    monkeypatch.setattr(environment, "import_module", refuse)
    requiring(monkeypatch, "torch")
    code, out, err = cli("doctor")
    assert code == 1
    assert "cannot be imported (libcudart.so.13: cannot open shared object file No such file)" in err
    assert "pip install --force-reinstall torch" in err
    assert "unknown: torch is not usable" in out


def test_an_old_python_and_a_source_that_was_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment.platform, "python_version", lambda: "3.8.1")
    assert environment.examine().problems[0].startswith("python: this is 3.8.1, needed >=3.")

    def absent(name: str) -> Any:
        raise environment.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(environment.metadata, "requires", absent)
    (package,) = environment.required()
    assert "pip install -e ." in package.problem


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_the_place_of_the_token_is_shown_and_the_token_never(
    form: list[str], cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    code, out, err = cli("doctor", *form)
    assert code == 0
    assert "verysecret" not in out + err
    assert "HF_TOKEN" in out


def test_gpus_with_their_memory() -> None:
    known = SimpleNamespace(name="Tesla", total_memory=80 * 10**9, major=9, minor=0)

    def busy(index: int) -> tuple[int, int]:
        if index == 1:
            raise RuntimeError("CUDA error: out of memory\nCompile with")
        return 60 * 10**9, 80 * 10**9

    cuda = SimpleNamespace(
        is_available=lambda: True, device_count=lambda: 2, get_device_properties=lambda i: known, mem_get_info=busy
    )
    torch = SimpleNamespace(cuda=cuda, backends=SimpleNamespace(mps=SimpleNamespace(is_available=lambda: False)))
    notes: list[str] = []
    first, second = environment._gpus(torch, notes)
    assert first == {
        "device": "cuda:0", "name": "Tesla", "memory": 80 * 10**9, "free": 60 * 10**9, "compute": "9.0",
    }  # fmt: skip
    assert (second["device"], second["free"]) == ("cuda:1", None)
    assert notes == ["cuda:1: cannot be used now (CUDA error: out of memory)"]


def test_a_gpu_that_torch_does_not_see(monkeypatch: pytest.MonkeyPatch) -> None:
    none = SimpleNamespace(is_available=lambda: False)
    torch = SimpleNamespace(
        cuda=none, backends=SimpleNamespace(mps=none), __version__="2.6+cpu", version=SimpleNamespace(cuda=None)
    )
    monkeypatch.setattr(environment.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    notes: list[str] = []
    assert environment._gpus(torch, notes) == []
    assert notes == ["nvidia-smi is here, but torch 2.6+cpu sees no GPU; it is a build without CUDA"]


def test_disk_of_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    assert environment._disk(tmp_path / "a" / "b")["free"] > 0
