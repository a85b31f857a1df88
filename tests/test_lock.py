"""Outputs are held by one run at a time; what is left of dead ones is swept; links and devices as outputs."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from liftkit.checkpoint import leftovers
from liftkit.checkpoint.files import atomic_file, output_file, write_text
from liftkit.checkpoint.folder import atomic_folder
from liftkit.checkpoint.leftovers import sweep, sweep_inside
from liftkit.checkpoint.lock import LOCK, SUFFIX, claim, remove_begun
from liftkit.errors import LiftkitError, UsageError
from liftkit.finetune.run_folder import RunFolder
from liftkit.finetune.state import checkpoints, write_checkpoint

HOLD = """
import sys
from pathlib import Path
from liftkit.checkpoint.lock import claim
with claim(Path(sys.argv[1]), inside=sys.argv[2] == "inside"):
    print("held", flush=True)
    sys.stdin.readline()
"""


def hold(output: Path, how: str = "beside") -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(output), how], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("how", ["beside", "inside"])
def test_who_holds_an_output_and_that_the_lock_dies_with_it(how: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    process = hold(output, how)
    wanted = rf"out: another run \(process {process.pid}\) is making it, on {socket.gethostname()} since 2\d\d\d-"
    with pytest.raises(UsageError, match=wanted), claim(output, inside=how == "inside"):
        pass
    process.kill()
    process.communicate()
    with claim(output, inside=how == "inside"):
        assert list(tmp_path.rglob(f"*{LOCK}"))
    assert not list(tmp_path.rglob(f"*{LOCK}"))


def test_a_second_run_may_wait(tmp_path: Path) -> None:
    process, said = hold(tmp_path / "cache", "inside"), []

    def note(text: str) -> None:
        said.append(text)
        process.communicate("\n")

    with claim(tmp_path / "cache", inside=True, waiting=note):
        pass
    assert len(said) == 1
    assert f"waits for process {process.pid}" in said[0]
    assert names(tmp_path) == []


def test_a_thread_may_claim_twice_and_two_threads_may_not(tmp_path: Path) -> None:
    errors: list[BaseException] = []

    def claim_too() -> None:
        try:
            with claim(tmp_path / "a"):
                pass
        except UsageError as error:
            errors.append(error)

    with claim(tmp_path / "a"), claim(tmp_path / "a"):
        other = threading.Thread(target=claim_too)
        other.start()
        other.join()
    assert len(errors) == 1


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"process": {"a": 1}, "host": "\\u001b[2J", "since": null}', "\xff"]
)
def test_whatever_a_lock_file_says_is_plain_text(content: str, tmp_path: Path) -> None:
    with claim(tmp_path / "a"):
        (tmp_path / f".a{LOCK}").write_text(content, encoding="latin-1")
        caught: list[str] = []

        def other() -> None:
            try:
                with claim(tmp_path / "a"):
                    pass
            except UsageError as error:
                caught.append(str(error))

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert "another run" in caught[0]
    assert caught[0].isprintable()


def test_leftovers_of_files_are_swept_and_living_ones_are_not(tmp_path: Path) -> None:
    for name in (".grid.png.4242.part", f".grid.png.1-0a{SUFFIX}", ".other.png.4242.part"):
        (tmp_path / name).write_text("half")
    with atomic_file(tmp_path / "grid.png") as file:
        file.write(b"whole")
        with output_file(tmp_path / "grid.png", ".png"):
            assert Path(file.name).exists()
    assert names(tmp_path) == [".other.png.4242.part", "grid.png"]
    sweep_inside(tmp_path)
    assert names(tmp_path) == ["grid.png"]


def test_a_folder_set_aside_returns_and_half_of_one_never(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "liftkit.json").write_text("{}")

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    # As killed between the new folder's rename and the old one's removal: what is left must not come back as the output.
    monkeypatch.setattr(leftovers, "remove", killed)
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "out", overwrite=True):
        pass
    monkeypatch.undo()
    (tmp_path / "out").rmdir()
    sweep(tmp_path / "out")
    assert names(tmp_path) == []


def test_an_old_folder_that_cannot_be_removed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "liftkit.json").write_text("{}")
    unlink = os.unlink

    def refuse(path: object, **choices: object) -> None:
        if str(path).endswith("liftkit.json"):
            raise PermissionError(1, "Operation not permitted", str(path))
        unlink(path, **choices)  # type: ignore[arg-type]

    monkeypatch.setattr("os.unlink", refuse)
    said = r"complete and in its place, but the old one could not be removed"
    with pytest.raises(LiftkitError, match=said), atomic_folder(tmp_path / "out", overwrite=True) as building:
        (building / "new").write_text("new")
    assert names(tmp_path / "out") == ["new"]


def test_a_link_stays_and_the_file_behind_it_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(Path("disk") / "real")
    for text in ("first", "second"):
        write_text(tmp_path / "link", text)
        assert (tmp_path / "disk" / "real").read_text() == text
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path / "disk") == ["real"]


def test_a_device_or_a_pipe_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "null.json").symlink_to("/dev/null")
    os.mkfifo(tmp_path / "pipe.json")
    for name in ("null.json", "pipe.json"):
        with pytest.raises(UsageError, match="no regular file"):
            write_text(tmp_path / name, "text")
        with pytest.raises(UsageError, match="no regular file"), output_file(tmp_path / name, ".json"):
            pass


def test_all_that_was_begun_goes_without_unwinding(tmp_path: Path) -> None:
    def end() -> None:
        with claim(tmp_path / "a"), atomic_folder(tmp_path / "out") as building, atomic_file(tmp_path / "b"):
            (building / "x").write_text("half")
            remove_begun()
            assert names(tmp_path) == []

    with pytest.raises(LiftkitError):
        end()


def test_rotation_keeps_what_it_says_after_a_kill(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    for step in (1, 2):
        write_checkpoint(folder.checkpoints, step, {}, {}, 9)
    # Killed in the middle of a removal by an earlier version: the record is gone, the folder is not.
    (folder.checkpoints / "step-0000001" / "state.json").unlink()
    (folder.checkpoints / "step-0000001" / "parameters.safetensors").touch()
    with folder.held():
        assert names(folder.checkpoints) == ["step-0000002"]
    for step in (1, 3):
        write_checkpoint(folder.checkpoints, step, {}, {}, 2)
    assert [step for step, _ in checkpoints(folder.checkpoints)] == [2, 3]


def test_a_link_in_a_circle_and_the_root_are_no_outputs(tmp_path: Path) -> None:
    (tmp_path / "self").symlink_to("self")
    for output, what in ((tmp_path / "self", "in a circle"), (Path("/"), "root of the disk")):
        with pytest.raises(UsageError, match=what), claim(output):
            pass
