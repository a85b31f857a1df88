"""The first word of every command: a line at once, heavy imports behind it."""

from __future__ import annotations

import importlib
import json
import os
import pty
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from liftkit.cli.answers import KEYS

ROOT = Path(__file__).parents[1]
Cli = Callable[..., tuple[int, str, str]]
HEAVY = ("torch", "diffusers", "transformers", "numpy", "sklearn", "scipy", "PIL", "huggingface_hub", "safetensors")
NOPE = "no-such-thing"
PROGRAM = """
import io, json, os, sys
given, heavy = json.loads(sys.argv[1])
from liftkit.cli import app

class First(io.StringIO):
    def write(self, text):
        if not text.strip():
            return len(text)
        line = json.dumps([name, text, sorted(set(heavy) & set(sys.modules))]) + "\\n"
        os.write(1, line.encode())
        os._exit(0)

for name, arguments in given.items():
    child = os.fork()
    if child == 0:
        sys.stdout, sys.stderr = First(), First()
        sys.argv = ["liftkit", *name.split(), *arguments]
        app.run()
        os._exit(1)
    os.waitpid(child, 0)
"""


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    """benchmarks/first_word.py, a script that knows what each command is called with."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("first_word")


def test_nothing_heavy_is_imported_before_the_first_word(benchmark: Any, tmp_path: Path) -> None:
    given = benchmark.COMMANDS
    assert given.keys() - {"--help", "--version"} == KEYS.keys()
    command = [sys.executable, "-c", PROGRAM, json.dumps([given, HEAVY])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300, check=True)
    found = {name: (text, loaded) for name, text, loaded in map(json.loads, done.stdout.splitlines())}
    assert found.keys() == given.keys(), done.stderr
    assert {name: loaded for name, (_, loaded) in found.items() if loaded} == {}
    assert [name for name, (text, _) in found.items() if "fault of liftkit" in text] == []
    for name in ("convert", "fit", "verify"):
        assert f"{name}: reading model ..." in found[name][0]


@pytest.mark.parametrize("terminal", [False, True])
def test_the_first_word_comes_soon(terminal: bool, tmp_path: Path) -> None:
    """Half a second is the aim; the bound is for machines that do much else."""
    mine, theirs = pty.openpty() if terminal else os.pipe()
    start = time.monotonic()
    program = [sys.executable, "-m", "liftkit", "verify", NOPE]
    process = subprocess.Popen(program, stderr=theirs, stdout=subprocess.DEVNULL, cwd=tmp_path)
    os.close(theirs)
    first = os.read(mine, 1000)
    took = time.monotonic() - start
    process.kill()
    process.wait()
    os.close(mine)
    assert b"verify: reading no-such-thing ..." in first
    assert took < 30


def test_the_first_word_is_printed_once_and_not_where_nobody_wants_it(cli: Cli) -> None:
    assert cli("verify", NOPE)[2].count(f"verify: reading {NOPE} ...") == 1
    for choice in ("--quiet", "--json"):
        code, _, stderr = cli("verify", NOPE, choice)
        assert (code, stderr.count("\n")) == (2, 1)
        assert stderr.startswith("error: ")


def test_of_many_processes_one_speaks_first(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert "reading" not in cli("verify", NOPE)[2]


def test_a_folder_of_demo_images_is_no_conversion(cli: Cli, tmp_path: Path) -> None:
    code, _, stderr = cli("demo", "--images", "2", "-o", str(tmp_path / "photos"))
    assert code == 0
    assert "demo: drawing 2 images ..." in stderr
    assert "converting" not in stderr
