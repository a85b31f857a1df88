"""Nothing half done: conversions that are killed, two at once, and disks that fill or refuse."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import liftkit
from liftkit.checkpoint import follow
from liftkit.checkpoint.lock import LOCK, SUFFIX
from liftkit.checkpoint.model import STEM
from liftkit.conversion import plan as planning
from liftkit.conversion.execute import execute
from liftkit.conversion.plan import make_plan
from liftkit.errors import LiftkitError, UsageError
from liftkit.options import ConvertOptions
from liftkit.progress import Silent
from tests import running
from tests.running import is_complete

Cli = Callable[..., tuple[int, str, str]]
WEIGHTS = f"transformer/{STEM}.safetensors"
CHOICES: dict[str, Any] = {"device": "cpu", "proof": "projections"}


# --------------------------------------------------------------------------------- killed, and two at once


@pytest.fixture(scope="module")
def processes() -> Any:
    """Processes that begin with everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(running.PRELOAD)
    return context


def start(processes: Any, model: Path, output: Path, lift: Path, overwrite: bool = False) -> Any:
    process = processes.Process(target=running.convert, args=(str(model), str(output), str(lift), overwrite))
    process.start()
    return process


def seen(folder: Path) -> set[tuple[str, int]]:
    """What stands in a folder, with its inode: replaced files are others."""
    with os.scandir(folder) as entries:  # which knows inodes without asking for files that may be gone
        return {(entry.name, entry.inode()) for entry in entries}


def await_change(process: Any, folder: Path, before: set[tuple[str, int]]) -> None:
    """Wait until a process has changed a folder, or has ended."""
    while process.is_alive() and seen(folder) == before:
        time.sleep(0.002)


@pytest.mark.parametrize("times", [12, pytest.param(100, marks=pytest.mark.slow)])
def test_a_killed_conversion_leaves_all_or_nothing(
    times: int, processes: Any, klein: Path, lift_file: Path, room: Path
) -> None:
    target, begun, touched = room / "out", 0.0, 0.0
    # The first starts the server, the second shows how long one takes, and for how long it works on the disk.
    for turn in range(2):
        begun, before = time.perf_counter(), seen(room)
        first = start(processes, klein, target, lift_file, overwrite=bool(turn))
        await_change(first, room, before)
        touched = time.perf_counter()
        first.join()
        assert first.exitcode == 0
    whole, writing = time.perf_counter() - begun, time.perf_counter() - touched
    assert [path.name for path in room.iterdir()] == ["out"]
    chance, killed, left, had = random.Random(0), 0, 0, True
    for turn in range(times):
        if turn % 3 == 0:
            shutil.rmtree(target, ignore_errors=True)
            had = False
        before = seen(room)
        process = start(processes, klein, target, lift_file, overwrite=True)
        # One in four is killed at any time, the rest while they work on the disk.
        if turn % 4:
            await_change(process, room, before)
        time.sleep(chance.uniform(0, 0.5 * writing if turn % 4 else 1.1 * whole))
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        leftovers = [path for path in room.iterdir() if path.name != "out"]
        left += bool(leftovers)
        assert all(path.name.startswith(".out.") and path.name.endswith((SUFFIX, LOCK)) for path in leftovers)
        if target.exists():
            assert is_complete(target)
            had = True
        elif had:
            # Killed between two renames: the earlier output stands beside, whole, and the next run brings it back.
            assert any(".old" in path.name and is_complete(path) for path in leftovers)
    assert killed > times // 3
    assert left > times // 4
    last = start(processes, klein, target, lift_file, overwrite=True)
    last.join()
    assert last.exitcode == 0
    assert is_complete(target)
    assert [path.name for path in room.iterdir()] == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_of_two_conversions_into_one_target_one_wins(
    overwrite: bool, processes: Any, klein: Path, lift_file: Path, room: Path
) -> None:
    for delay in (0.0, 0.1):
        shutil.rmtree(room / "out", ignore_errors=True)
        both = []
        for _ in range(2):
            both.append(start(processes, klein, room / "out", lift_file, overwrite))
            time.sleep(delay)
        for process in both:
            process.join()
        codes = sorted(process.exitcode for process in both)
        # With leave to overwrite, one may begin when the other is done.
        assert codes == [0, 3] or (overwrite and codes == [0, 0])
        assert is_complete(room / "out")
        assert [path.name for path in room.iterdir()] == ["out"]


def test_a_second_run_learns_so_before_its_work(cli: Cli, klein: Path, lift_file: Path, room: Path) -> None:
    plan = make_plan(str(klein), room / "out", ConvertOptions(lift=lift_file, **CHOICES))
    seen = []

    class Meanwhile(Silent):
        def stage(self, title: str, total: float | None, unit: str) -> Any:
            seen.append(
                cli("convert", klein, "--lift", lift_file, "-o", room / "out", "--overwrite", "--device", "cpu")
            )
            return super().stage(title, total, unit)

    execute(plan, Meanwhile())
    assert len(seen) >= 3
    for code, _, err in seen:
        assert code == 2
        assert f"another run (process {os.getpid()}) is making it" in err
    assert is_complete(room / "out")


# ------------------------------------------------------------------------------------ disks that refuse


@pytest.mark.parametrize(
    "call", ["os.pwrite", "os.copy_file_range", "os.fsync", "os.fdatasync", "os.rename", "os.replace"]
)
def test_a_disk_that_fills_at_any_moment(
    call: str, klein: Path, lift_file: Path, room: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The n-th call of each kind fails, for n until the conversion comes through."""
    name = call.removeprefix("os.")
    # What the kernel will not copy is copied by hand, and refused there too.
    both = (name, "pwrite") if name == "copy_file_range" else (name,)
    failures = 0
    for moment in (0, 1, 2, 5, 11, 23, 10_000):
        count = iter(range(10**9))
        for each in both:
            monkeypatch.setattr(os, each, partial(fail_after, getattr(os, each), count, moment))
        try:
            liftkit.convert(str(klein), room / "out", lift=lift_file, **CHOICES)
        except LiftkitError as error:
            failures += 1
            assert "No space left on device" in str(error)
            assert not list(room.iterdir())
        else:
            assert is_complete(room / "out")
            break
        finally:
            monkeypatch.undo()
    assert failures >= (1 if name == "rename" else 2)


def fail_after(original: Any, count: Iterator[int], moment: int, *arguments: Any) -> Any:
    if next(count) >= moment:
        raise OSError(28, "No space left on device")
    return original(*arguments)


def mounted(place: Path, options: str) -> bool:
    """Whether a small file system of its own could be mounted (as root)."""
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    place = tmp_path / "disk"

    def make(options: str) -> Path:
        if not mounted(place, options):
            pytest.skip("mounting needs root")
        return place

    yield make
    subprocess.run(["umount", str(place)], capture_output=True, check=False)


def test_a_small_disk(
    klein: Path, lift_file: Path, small_disk: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = small_disk("size=4m")
    (place / "ballast").write_bytes(bytes(3000 << 10))
    with pytest.raises(UsageError, match=r"GB are needed and 0.00 GB are free"):
        liftkit.convert(str(klein), place / "out", lift=lift_file, **CHOICES)
    monkeypatch.setattr(planning, "check_space", lambda target, needed: None)
    outcomes = set()
    for ballast in (4000, 3980, 3900, 3850, 3800, 3700, 3600, 3500, 3300, 2000):
        (place / "ballast").write_bytes(bytes(ballast << 10))
        try:
            liftkit.convert(str(klein), place / "out", lift=lift_file, **CHOICES)
            outcomes.add("done")
            assert is_complete(place / "out")
        except LiftkitError as error:
            outcomes.add("refused")
            assert "No space left on device" in str(error)
        (place / "ballast").unlink()
        assert {path.name for path in place.iterdir()} <= {"out"}
        shutil.rmtree(place / "out", ignore_errors=True)
    assert outcomes == {"done", "refused"}


def test_a_read_only_disk(cli: Cli, klein: Path, lift_file: Path, small_disk: Callable[[str], Path]) -> None:
    place = small_disk("size=1m,ro")
    code, _, err = cli("convert", klein, "--lift", lift_file, "-o", place / "out")
    assert code == 2
    assert f"{place}: not writable; choose another output" in err


def test_a_read_only_folder(
    cli: Cli, klein: Path, lift_file: Path, room: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room.chmod(0o555)
    # Root may write everywhere; the check is the same.
    if os.geteuid() == 0:
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != room)
    code, _, err = cli("convert", klein, "--lift", lift_file, "-o", room / "out")
    assert code == 2
    assert f"{room}: not writable" in err
    room.chmod(0o755)


def test_a_failed_sync_of_a_thread_is_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel tells a write error once: whoever hears it must pass it on."""

    def refuse(handle: int) -> None:
        raise OSError(5, "Input/output error")

    save_file({"a": torch.ones(3)}, tmp_path / "x.safetensors")
    monkeypatch.setattr(os, "fdatasync", refuse)
    follower = follow.Follower(tmp_path / "x.safetensors", 10, sync=True)
    follower.advance(10)
    with follow.Ledger(tmp_path) as ledger, pytest.raises(OSError, match="Input/output error"):
        ledger.add(follower.path, follower)
        ledger.digests()
