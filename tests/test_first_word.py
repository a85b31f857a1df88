"""The first word of every command: a line at once, heavy imports behind it."""

from __future__ import annotations

import importlib
import inspect
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
from liftkit.cli.app import app
from liftkit.cli.options import named_options
from liftkit.options import Argument

ROOT = Path(__file__).parents[1]
Cli = Callable[..., tuple[int, str, str]]
HEAVY = ("torch", "diffusers", "transformers", "numpy", "sklearn", "scipy", "PIL", "huggingface_hub", "safetensors")
NOPE = "no-such-thing"
WRITTEN = {"output", "moments_out", "html", "json", "cache"}
"""Options of files and folders that a command makes."""
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
REFUSALS = """
import io, json, os, sys
given, heavy = json.loads(sys.argv[1])
from liftkit.cli import app

for arguments in given:
    child = os.fork()
    if child == 0:
        sys.stderr = io.StringIO()
        sys.argv = ["liftkit", *arguments]
        try:
            app.run()
            code = 0
        except SystemExit as exit_:
            code = exit_.code
        loaded = sorted(set(heavy) & set(sys.modules))
        os.write(1, (json.dumps([arguments, code, sys.stderr.getvalue(), loaded]) + "\\n").encode())
        os._exit(0)
    os.waitpid(child, 0)
"""


def refusals(given: list[list[str]], heavy: tuple[str, ...]) -> list[tuple[list[str], str]]:
    """What commands that are refused print, each in a process that has imported nothing; none imports anything heavy."""
    command = [sys.executable, "-c", REFUSALS, json.dumps([given, heavy])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [arguments for arguments, *_ in found] == given, done.stderr
    assert [(arguments, code) for arguments, code, *_ in found if code != 2] == []
    assert [(arguments, loaded) for arguments, *_, loaded in found if loaded] == []
    return [(arguments, text) for arguments, _, text, _ in found]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    """benchmarks/first_word.py, a script that knows what each command is called with."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("first_word")


def test_nothing_heavy_is_imported_before_the_first_word(benchmark: Any, tmp_path: Path) -> None:
    given = benchmark.COMMANDS
    assert given.keys() - {"--help", "--version"} == KEYS.keys()
    command = [sys.executable, "-c", PROGRAM, json.dumps([given, HEAVY])]
    benchmark.lay_out(tmp_path)
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
    program = [sys.executable, "-m", "liftkit", "verify", "."]
    process = subprocess.Popen(program, stderr=theirs, stdout=subprocess.DEVNULL, cwd=tmp_path)
    os.close(theirs)
    first = os.read(mine, 1000)
    took = time.monotonic() - start
    process.kill()
    process.wait()
    os.close(mine)
    assert b"verify: reading . ..." in first
    assert took < 30


def test_the_first_word_is_printed_once_and_not_where_nobody_wants_it(cli: Cli) -> None:
    assert cli("verify", ".")[2].count("verify: reading . ...") == 1
    for choice in ("--quiet", "--json"):
        code, _, stderr = cli("verify", ".", choice)
        assert (code, stderr.count("\n")) == (2, 1)
        assert stderr.startswith("error: ")


def test_of_many_processes_one_speaks_first(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert "reading" not in cli("verify", ".")[2]


def test_a_command_that_names_nothing_is_refused_before_anything_heavy_is_imported(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    benchmark.lay_out(tmp_path)
    given, unchecked = [], set()
    for command in app.registered_commands:
        assert command.callback is not None
        name = command.name or command.callback.__name__
        for key, option in named_options(inspect.unwrap(command.callback)).items():
            if option.names is None:
                unchecked |= {key} if option.metavar in ("FILE", "FOLDER", "MODEL", "PIXEL") else set()
                continue
            words = benchmark.COMMANDS[name]
            if isinstance(option, Argument):
                place = 1 if key == "pixels" else 0
                given.append([name, *words[:place], NOPE, *words[place + 1 :]])
            else:
                given.append([name, *words, option.flags[0] if option.flags else f"--{key.replace('_', '-')}", NOPE])
    assert unchecked == WRITTEN
    for arguments, text in refusals(given, HEAVY):
        assert text.startswith("error: "), arguments
        assert f"{NOPE}: no such f" in text, arguments


def test_a_wrong_recipe_is_refused_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    wrong = ["stepps=3", "steps=three", "steps=0", "base.quantize=nf4", "model=no/such/model", "data.sources.0.path=no"]
    recipe = ["finetune", "tiny-klein", "trainable.mode=full", "data.sources=[{kind: folder, path: .}]"]
    given = [[*recipe, f"output={tmp_path / 'run'}", text, *more] for text in wrong for more in ([], ["--dry-run"])]
    given += [["finetune", NOPE], ["finetune", "--resume", NOPE], ["finetune", "tiny-klein", "--memory", "x"]]
    for arguments, text in refusals(given, ("torch", "diffusers", "transformers")):
        assert "problem" in text or "no such" in text or "--memory x" in text, arguments
    assert not any(tmp_path.iterdir())


def test_a_folder_of_demo_images_is_no_conversion(cli: Cli, tmp_path: Path) -> None:
    code, _, stderr = cli("demo", "--images", "2", "-o", str(tmp_path / "photos"))
    assert code == 0
    assert "demo: drawing 2 images ..." in stderr
    assert "converting" not in stderr
