"""Outputs that replace others, and what killed runs leave."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from liftkit.checkpoint.files import atomic_file, write_text
from liftkit.checkpoint.folder import SUFFIX, atomic_folder, check_target
from liftkit.errors import LiftkitError, UsageError
from tests.safetensors_files import content, fill, source

__all__ = ["source"]


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


def make(target: Path, **choices: bool) -> None:
    with atomic_folder(target, **choices) as building:
        (building / "new").write_text("new")


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
