"""Pushing: private unless said otherwise, nothing without the flag, nothing before it is known to be possible."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, HTTPError, RepositoryNotFoundError

from liftkit import hub
from liftkit.checkpoint.model import find_model
from liftkit.errors import LiftkitError, UsageError
from liftkit.formats.adapters import open_adapter
from tests import tiny
from tests.adapters import random_adapter
from tests.converting import failed

Cli = Callable[..., tuple[int, str, str]]


def answer(kind: type[HfHubHTTPError], status: int) -> HfHubHTTPError:
    response: Any = SimpleNamespace(headers={}, request=None)
    return kind(f"{status} Client Error.\n\nSays the Hub.", response=response)


class FakeHub:
    """The Hub's client, with repositories in memory; keeps what it is asked."""

    def __init__(self) -> None:
        self.private: dict[str, bool] = {}
        self.calls: list[tuple[Any, ...]] = []
        self.error: Exception | None = None

    def __call__(self) -> FakeHub:
        return self

    def whoami(self) -> dict[str, str]:
        return {"name": "me"}

    def model_info(self, repo: str) -> Any:
        if repo not in self.private:
            raise answer(RepositoryNotFoundError, 404)
        return SimpleNamespace(private=self.private[repo])

    def create_repo(self, repo: str, *, private: bool, exist_ok: bool) -> Any:
        assert exist_ok
        self.calls.append(("create", repo, private))
        self.private.setdefault(repo, private)
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo if '/' in repo else f'me/{repo}'}")

    def upload_folder(self, *, folder_path: Path, repo_id: str, commit_message: str) -> None:
        if self.error is not None:
            raise self.error
        files = {path.relative_to(folder_path).as_posix() for path in folder_path.rglob("*") if path.is_file()}
        self.calls.append(("upload", repo_id, files))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    api = FakeHub()
    monkeypatch.setattr(huggingface_hub, "HfApi", api)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_token_of_a_test")
    return api


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model" / "inner").mkdir(parents=True)
    (tmp_path / "model" / "README.md").write_text("# card\n")
    (tmp_path / "model" / "inner" / "weights.safetensors").write_bytes(b"x")
    return tmp_path / "model"


def test_a_folder_goes_whole_and_private(fake: FakeHub, folder: Path) -> None:
    assert hub.push(folder, "org/name") == "https://huggingface.co/org/name"
    assert fake.calls == [
        ("create", "org/name", True),
        ("upload", "org/name", {"README.md", "inner/weights.safetensors"}),
    ]
    hub.push(folder, "org/name")
    hub.push(folder, "mine")
    assert fake.calls[-1][1] == "me/mine"
    hub.push(folder, "org/open", private=False)
    assert not fake.private["org/open"]


def test_nothing_private_goes_to_a_public_repository(fake: FakeHub, folder: Path) -> None:
    fake.private["org/open"] = fake.private["me/open"] = False
    for name in ("org/open", "open"):
        with pytest.raises(UsageError, match=r"is public; pass --public"):
            hub.push(folder, name)
    assert not fake.calls
    hub.push(folder, "org/open", private=False)
    assert fake.calls[-1][:2] == ("upload", "org/open")


def test_what_cannot_be_pushed_is_said_first(
    fake: FakeHub, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="no name of a Hub repository"):
        hub.check_push("a/b/c")
    (folder / "README.md").unlink()
    with pytest.raises(UsageError, match="no model card"):
        hub.push(folder, "org/name")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match="HF_HUB_OFFLINE is set"):
        hub.check_push("org/name")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(UsageError, match="no token; set HF_TOKEN"):
        hub.check_push("org/name")
    assert not fake.calls


def test_a_refusal_is_one_line_and_the_folder_stays(fake: FakeHub, folder: Path) -> None:
    for error in (answer(HfHubHTTPError, 403), HTTPError("no route"), OSError("broken pipe")):
        fake.error = error
        with pytest.raises(LiftkitError, match=r"the Hub did not do it .*hf upload org/name") as caught:
            hub.push(folder, "org/name")
        assert caught.value.exit_code == 1
        assert "\n" not in str(caught.value)
    assert (folder / "inner" / "weights.safetensors").exists()


@pytest.mark.parametrize("command", ["convert", "export", "import"])
def test_commands_push_only_when_asked(
    command: str,
    fake: FakeHub,
    cli: Cli,
    converted: dict[str, Path],
    model_folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    output = tmp_path / "out"
    tiny.lift().save(tmp_path / "lift.safetensors")
    ours = random_adapter(converted["flux2"])
    ours.save(tmp_path / "adapter", "# card\n")
    arguments: dict[str, tuple[Any, ...]] = {
        "convert": (model_folders["flux2"], "--lift", tmp_path / "lift.safetensors", "--device", "cpu"),
        "export": (tmp_path / "paper", "--format", "asymflow-adapter", "--base", model_folders["flux2"]),
        "import": (tmp_path / "adapter", "--base", converted["flux2"], "--keep-adapter"),
    }
    if command == "export":
        replace(ours, lift=tiny.lift()).save(tmp_path / "paper", "# card\n")
    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub, "get_token", lambda: None)
        failed(cli(command, *arguments[command], "-o", output, "--push", "org/name"), "no token")
        assert not output.exists()
    failed(cli(command, *arguments[command], "-o", output, "--public"), "give --push")
    if command != "convert":  # which takes its time
        code, out, err = cli(command, *arguments[command], "-o", output)
        assert code == 0, err
        assert not fake.calls
        shutil.rmtree(output)
    code, out, err = cli(command, *arguments[command], "-o", output, "--push", "org/name")
    assert code == 0, err
    assert "pushed to https://huggingface.co/org/name (private)" in out
    assert {"README.md", "liftkit.json"} <= fake.calls[-1][2]


def test_adapters_and_configs_are_fetched_from_the_hub(
    converted: dict[str, Path], model_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ours = random_adapter(converted["flux2"])
    store, cache = tmp_path / "store", tmp_path / "cache"
    (store / "org" / "adapters").mkdir(parents=True)
    ours.save(store / "org" / "adapters" / "first", "# card\n")
    shutil.copytree(model_folders["flux2"], store / "org" / "model")

    def snapshot_download(repo: str, allow_patterns: list[str]) -> str:
        for path in sorted((store / repo).rglob("*")):
            name = path.relative_to(store / repo).as_posix()
            if path.is_file() and any(fnmatch(name, pattern) for pattern in allow_patterns):
                (cache / repo / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, cache / repo / name)
        return str(cache / repo)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    found = open_adapter("org/adapters/first")
    assert all(torch.equal(tensor, found.tensors[name]) for name, tensor in ours.tensors.items())
    for wrong in ("org/adapters/../adapters", "org", "/nowhere/at/all"):
        with pytest.raises(UsageError, match="no adapter folder: no such folder, and no Hub id"):
            open_adapter(wrong)
    with pytest.raises(UsageError, match="no adapter"):
        open_adapter("org/adapters/second")
    find_model("org/model", without="transformer")
    names = {path.name for path in (cache / "org" / "model" / "transformer").iterdir()}
    assert names == {"config.json"}
    assert (cache / "org" / "model" / "vae" / "diffusion_pytorch_model.safetensors").is_file()
