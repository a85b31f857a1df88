"""Folders are built in another process, to find out whether they would load."""

from __future__ import annotations

import fcntl
import io
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import pytest
import torch

from liftkit.checkpoint.lock import claim
from liftkit.checkpoint.model import find_model
from liftkit.checkpoint.rewrite import torch_dtype
from liftkit.conversion import execute
from liftkit.embedded import TINY_KLEIN
from liftkit.errors import LiftkitError, UsageError
from liftkit.fork import Fork
from liftkit.models import builder, load
from liftkit.models.builder import Builder
from liftkit.models.trial import Trial
from liftkit.progress import Silent

linux = pytest.mark.skipif(sys.platform != "linux", reason="processes are copied on Linux alone")


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """The embedded model without the vocabulary of its tokenizer."""
    folder = Path(shutil.copytree(TINY_KLEIN, tmp_path / "broken"))
    (folder / "tokenizer" / "tokenizer.json").unlink()
    return folder


@pytest.fixture
def without_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this process had not imported diffusers, and might not be copied."""
    monkeypatch.delitem(sys.modules, "diffusers", raising=False)
    monkeypatch.setattr(builder, "may_fork", lambda: False)


@pytest.mark.slow
def test_a_light_process_answers_for_every_architecture(
    model_folders: dict[str, Path], without_libraries: None
) -> None:
    light = Builder(light=True)
    folders = [find_model(str(folder)) for folder in (TINY_KLEIN, *model_folders.values())]
    for folder in folders:
        light.ask(folder)
        assert light.answer(folder) == [], folder.source
    light.end()


@pytest.mark.slow
def test_a_light_process_without_transformers_builds_what_has_no_text_side_and_nothing_else(
    tmp_path: Path, without_libraries: None
) -> None:
    bare = Path(shutil.copytree(TINY_KLEIN, tmp_path / "bare"))
    index = json.loads((bare / "model_index.json").read_text())
    sides = {key: [None, None] for key in ("text_encoder", "tokenizer")}
    (bare / "model_index.json").write_text(json.dumps(index | sides))
    light = Builder(light=True)
    for folder in (find_model(str(bare)), find_model(str(TINY_KLEIN))):
        light.ask(folder)
    assert light.answer(folder) == []
    with pytest.raises(UsageError, match="transformers"):
        light.answer(folder)
    light.end()


@pytest.mark.slow
def test_what_a_light_process_finds_amiss_another_looks_at(broken: Path, without_libraries: None) -> None:
    """What it finds is what this process would, and its end is no answer."""
    trial = Trial()
    first, second = (trial.begin(find_model(str(folder))) for folder in (TINY_KLEIN, broken))
    assert first() == []
    assert trial._builder is not None
    assert trial._builder.light
    for _ in range(2):
        with pytest.raises(UsageError, match=r"tokenizer\.json"):
            second()
    assert not trial._builder.light
    answer = trial.begin(find_model(str(TINY_KLEIN)))
    assert answer() == []
    process = trial._builder._process
    process.kill()
    process.wait()
    with pytest.raises(LiftkitError, match="the process that tries to load it ended with -9"):
        trial.begin(find_model(str(TINY_KLEIN)))()
    trial.end()


def test_a_light_process_leaves_adapters_to_the_whole_libraries(tmp_path: Path) -> None:
    """Without peft nobody reads them, and a broken one would pass."""
    folder = Path(shutil.copytree(TINY_KLEIN, tmp_path / "adapted"))
    (folder / "text_encoder" / builder.ADAPTER).write_text("{")
    answers = io.StringIO()
    builder._serve(io.StringIO(json.dumps([str(folder), "adapted"]) + "\n"), answers, light=True)
    assert "adapted: holds an adapter" in json.loads(answers.getvalue())["error"]
    with pytest.raises(UsageError, match="cannot be loaded"):
        builder.cannot_load(find_model(str(folder)))


@linux
@pytest.mark.parametrize("save", ["model", "adapter"])
def test_a_conversion_that_fails_leaves_no_process(save: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though its plan lives on, as in a traceback."""
    monkeypatch.setattr(builder, "_light", shout)
    monkeypatch.setattr(builder, "may_fork", lambda: True)
    monkeypatch.setattr(execute, "_lift", lambda plan, observer: pytest.fail("it fails"))
    trial = Trial()
    trial._builder = Builder(light=True)
    process = trial._builder._process
    assert isinstance(process, Fork)
    options = SimpleNamespace(save=save, overwrite=False)
    with pytest.raises(pytest.fail.Exception, match="it fails"):
        execute.execute(SimpleNamespace(options=options, trial=trial, output=tmp_path / "out"), Silent())  # type: ignore[arg-type]
    assert process.returncode == -signal.SIGKILL


def test_nothing_is_started_for_a_model_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from liftkit.conversion.plan import make_plan
    from liftkit.options import ConvertOptions

    monkeypatch.delitem(sys.modules, "diffusers", raising=False)
    monkeypatch.setattr("liftkit.models.trial.Builder", lambda light: pytest.fail("a process was started"))
    with pytest.raises(UsageError, match="no such folder"):
        make_plan(str(tmp_path / "nothing"), tmp_path / "out", ConvertOptions(images="demo", device="cpu"))


def test_no_weight_is_read_to_find_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Diffusers converts weights of another dtype than it is asked for, and reads them for that."""
    folder = find_model(str(TINY_KLEIN))
    part = load.read_component(folder, "transformer")
    assert part.weights is not None
    kinds = {entry.dtype for header in part.weights.headers.values() for entry in header.tensors.values()}
    stock = load._class(part).from_pretrained
    asked: list[torch.dtype | None] = []

    def from_pretrained(*given: Any, **more: Any) -> Any:
        asked.append(more.get("dtype"))
        return stock(*given, **more)

    monkeypatch.setattr(load._class(part), "from_pretrained", from_pretrained)
    load.load_component(folder, "transformer", device="meta")
    assert asked == [torch_dtype(kind) for kind in kinds]


def shout(questions: IO[str], answers: IO[str]) -> None:
    for line in questions:
        if line == "fail\n":
            print("on the way out", flush=True)
            raise ValueError("a reason")
        answers.write(line.upper())
        answers.flush()


@linux
def test_a_copy_of_the_process_answers_and_ends_with_its_questions() -> None:
    with tempfile.TemporaryFile("w+") as errors:
        fork = Fork(shout, errors)
        fork.stdin.write("hello\n")
        fork.stdin.flush()
        assert fork.stdout.readline() == "HELLO\n"
        fork.stdin.close()
        assert fork.wait() == 0
        assert fork.stdout.read() == ""
        fork.stdout.close()


@linux
def test_a_copy_that_fails_says_so_and_does_not_go_on_with_the_work_of_its_original(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with tempfile.TemporaryFile("w+") as errors:
        fork = Fork(shout, errors)
        fork.stdin.write("fail\n")
        fork.stdin.close()
        assert fork.wait() == 1
        errors.seek(0)
        assert "ValueError: a reason" in errors.read()
        fork.stdout.close()
    assert capfd.readouterr().out == ""


@linux
def test_a_copy_can_be_killed() -> None:
    with tempfile.TemporaryFile("w+") as errors:
        fork = Fork(shout, errors)
        fork.kill()
        assert fork.wait() == -9
        fork.kill()
        fork.stdin.close()
        fork.stdout.close()


@linux
def test_a_copy_is_waited_for_whatever_number_its_file_has() -> None:
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    with tempfile.TemporaryFile("w+") as errors:
        fork = Fork(shout, errors)
        if most > 1100:
            with fork.stdout:
                fork.stdout = os.fdopen(fcntl.fcntl(fork.stdout.fileno(), fcntl.F_DUPFD_CLOEXEC, 1050))
        assert not fork.speaks(0.01)
        fork.stdin.write("a line\n")
        fork.stdin.flush()
        assert fork.speaks(10)
        assert fork.stdout.readline() == "A LINE\n"
        fork.stdin.close()
        assert fork.speaks(10)
        assert fork.stdout.read() == ""
        fork.stdout.close()
        assert fork.wait() == 0


@linux
def test_a_copy_holds_nothing_that_its_original_holds(tmp_path: Path) -> None:
    """A lock of a run that is killed is free at once, though its copy is still at work."""
    place = tmp_path / "output"
    with tempfile.TemporaryFile("w+") as errors, claim(place), (tmp_path / "open").open("w") as file:
        file.write("once")
        lock = tmp_path / ".output.liftkit-lock"
        fork = Fork(shout, errors)
        fork.stdin.write("ready\n")
        fork.stdin.flush()
        assert fork.stdout.readline() == "READY\n"
        links = [os.path.realpath(each) for each in Path(f"/proc/{fork.pid}/fd").iterdir()]
        assert not {str(lock), file.name} & set(links)
        with lock.open() as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fork.kill()
        fork.wait()
        fork.stdin.close()
        fork.stdout.close()
    assert (tmp_path / "open").read_text() == "once"


@linux
def test_a_copy_that_nobody_has_to_wait_for_has_ended_all_the_same() -> None:
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        with tempfile.TemporaryFile("w+") as errors:
            fork = Fork(shout, errors)
            fork.stdin.close()
            assert fork.stdout.read() == ""
            assert fork.wait() == 0
            fork.stdout.close()
            gone = Fork(shout, errors)
            os.kill(gone.pid, signal.SIGKILL)
            assert gone.stdout.read() == ""
            time.sleep(0.05)
            gone.kill()
            assert gone.wait() == 0
            for file in (gone.stdin, gone.stdout):
                file.close()
    finally:
        signal.signal(signal.SIGCHLD, before)


@linux
def test_signals_that_are_ignored_stay_so_in_a_copy() -> None:
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with tempfile.TemporaryFile("w+") as errors:
            fork = Fork(shout, errors)
            os.kill(fork.pid, signal.SIGHUP)
            fork.stdin.write("still here\n")
            fork.stdin.close()
            assert fork.stdout.readline() == "STILL HERE\n"
            assert fork.wait() == 0
            fork.stdout.close()
    finally:
        signal.signal(signal.SIGHUP, before)


@linux
def test_without_room_for_a_copy_nothing_is_left_open(monkeypatch: pytest.MonkeyPatch) -> None:
    def fork() -> int:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", fork)
    before = len(os.listdir("/proc/self/fd"))
    with tempfile.TemporaryFile("w+") as errors, pytest.raises(BlockingIOError):
        Fork(shout, errors)
    assert len(os.listdir("/proc/self/fd")) == before
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())
    monkeypatch.setattr(builder, "_start", lambda light, errors: light)
    monkeypatch.setattr(builder, "may_fork", lambda: True)
    with tempfile.TemporaryFile("w+") as errors:
        assert builder._copy(errors) is True
