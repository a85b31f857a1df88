"""Where output cannot go: closed pipes, full disks, closed streams, terminals of ASCII; and signals that end a command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from liftkit.embedded import TINY_KLEIN
from liftkit.interrupt import ENDING, Stopped, exit_code, listening, stopped_by

PROGRAM = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from liftkit.cli.app import run; run()"
)
LIFTKIT = [sys.executable, "-c", PROGRAM]


def shell(arguments: str, redirection: str) -> subprocess.CompletedProcess[str]:
    command = f'set -o pipefail; "$@" {arguments} {redirection}'
    environment = {**os.environ, "TERM": "dumb"}
    return subprocess.run(
        ["bash", "-c", command, "liftkit", *LIFTKIT], capture_output=True, text=True, env=environment, check=False
    )


@pytest.mark.parametrize(
    ("arguments", "redirection", "code"),
    [
        ("recipes list", "| true", 0),
        ("recipes list", ">/dev/full", 1),
        ("--json recipes list", "| true", 0),
        ("--json recipes list", ">/dev/full", 1),
        ("--json recipes list", ">&-", 0),
        ("--version", ">/dev/full", 1),
    ],
)
def test_output_that_cannot_be_printed(arguments: str, redirection: str, code: int) -> None:
    done = shell(arguments, redirection)
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert "fault" not in done.stderr
    assert ("No space left on device" in done.stderr) == (code == 1)


def test_an_error_whose_line_cannot_be_printed_keeps_its_exit_code() -> None:
    for redirection in ("2>/dev/full", ">&- 2>&-"):
        assert shell("report /nonexistent", redirection).returncode == 2


def test_a_terminal_of_ascii(tmp_path: Path) -> None:
    recipe = tmp_path / "é\N{WHITE SMILING FACE}.yaml"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    done = subprocess.run(
        [*LIFTKIT, "recipes", "copy", "tiny-klein", str(recipe)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert recipe.is_file()
    assert "\\u263a.yaml" in done.stdout


@pytest.fixture
def hangups_end() -> Iterator[None]:
    """As where no ``nohup`` is around the tests."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("hangups_end")
@pytest.mark.parametrize("number", ENDING)
def test_ending_signals_are_heard_and_named(number: int) -> None:
    heard = []
    with listening(lambda received, frame: heard.append(received)):
        os.kill(os.getpid(), number)
        time.sleep(0.01)
    assert heard == [number]
    error = KeyboardInterrupt()
    error.__cause__ = Stopped(number)
    assert exit_code(stopped_by(error)) == 128 + number


def test_what_is_ignored_stays_ignored() -> None:
    """As ``nohup`` does with SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with listening(lambda received, frame: pytest.fail("heard")):
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.01)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("hangups_end")
@pytest.mark.parametrize(("number", "times"), [(signal.SIGHUP, 1), (signal.SIGTERM, 2)])
def test_a_signal_ends_a_conversion_without_a_trace(number: int, times: int, tmp_path: Path) -> None:
    """A second signal ends a clean-up that hangs."""
    program = f"""
import time
from collections.abc import Iterator
from liftkit.cli import app, console
stage = console.Bars.stage
def slow(self, title, total, unit):
    print("now", flush=True)
    try:
        time.sleep(30)
    finally:
        time.sleep(30 if {times} > 1 else 0)
console.Bars.stage = slow
app.run()
"""
    command = [sys.executable, "-c", program, "convert", str(TINY_KLEIN), "--images", "demo", "-o", tmp_path / "out"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == "now":
            break
    assert any(tmp_path.iterdir())
    for _ in range(times):
        time.sleep(0.3)
        process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 128 + number, err
    assert "interrupted" in err
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_the_answer_says_which_exit_code(tmp_path: Path) -> None:
    done = shell(f"--json report {tmp_path}/none", "")
    assert json.loads(done.stdout)["exit_code"] == done.returncode == 2
