"""What reaches the terminal: text, whatever names, keys and messages hold."""

from __future__ import annotations

import io
import json
import re
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.progress import Progress
from rich.table import Table

from liftkit.cli import console
from liftkit.cli.app import run
from liftkit.cli.terminal import Guarded, SafeConsole, guarded

NASTY = "a\x1b[2Jb\x1b]0;t\x07c\x9b31md\x7fe\u202ef\u2028g\rh[bold]i[/x]j[link=x]k\x00"
SHOWN = r"a\x1b[2Jb\x1b]0;t\x07c\x9b31md\x7fe\u202ef\u2028g\rh[bold]i[/x]j[link=x]k\x00"


def controls(text: str) -> set[str]:
    """Characters that a terminal acts on."""
    return {each for each in text if unicodedata.category(each) in ("Cc", "Cf", "Zl", "Zp") and each not in "\n\t"}


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    stream = io.StringIO()
    for each in (console.out, console.err):
        monkeypatch.setattr(each, "_file", stream)
    console.begin()
    monkeypatch.setattr(console.out, "quiet", False)
    return stream


def test_every_way_to_print_shows_text_as_text(plain: io.StringIO) -> None:
    console.fail(NASTY)
    console.note(NASTY)
    console.table(NASTY, [(NASTY, NASTY)])
    console.out.print(NASTY)
    with console.Bars().stage(NASTY, 1, NASTY):
        pass
    table = Table(NASTY)
    table.add_row(NASTY)
    console.out.print(table)
    assert not controls(plain.getvalue())
    assert plain.getvalue().count(SHOWN) >= 4


@given(st.text())
def test_nothing_controls_the_terminal(text: str) -> None:
    stream = io.StringIO()
    SafeConsole(file=stream).print(text)
    Guarded(stream).write(text)
    assert not controls(stream.getvalue())


@given(st.text(alphabet="[]/ab=\\ #@link:"))
def test_markup_is_text(text: str) -> None:
    stream = io.StringIO()
    SafeConsole(file=stream).print(text)
    assert stream.getvalue() == f"{text}\n"


def test_colors_and_bars_of_our_own_still_work_on_a_terminal() -> None:
    stream = io.StringIO()
    screen = SafeConsole(file=stream, force_terminal=True, color_system="standard", width=80)
    with Progress(console=screen) as progress:
        progress.add_task("work x\x1b[2J", total=1)
    assert "\x1b[" in stream.getvalue()
    # What the name holds is not among them.
    assert "work x\\x1" in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())


def test_colors_of_libraries_pass_to_a_terminal_and_nothing_else_does() -> None:
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Screen()
    Guarded(screen).write("\x1b[31mred\x1b[0m \x1b[2J \x1b]0;x\x07\n")
    assert screen.getvalue() == "\x1b[31mred\x1b[0m \\x1b[2J \\x1b]0;x\\x07\n"


def test_prints_of_libraries_are_guarded(capsys: pytest.CaptureFixture[str]) -> None:
    with guarded():
        print(NASTY)
        print(NASTY, file=sys.stderr)
        console.note(NASTY)
    print("\x1b after")
    found = capsys.readouterr()
    assert found.out == f"{SHOWN}\n\x1b after\n"
    assert found.err == f"{SHOWN}\nnote: {SHOWN}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        [NASTY.replace("\x00", "")], ["convert", NASTY.replace("\x00", ""), "-o", "x"], ["sample", "demo", "--count", "\x1b[2J"],
        ["convert", "--\x1b[2J"], ["report", "\x1b[2J.safetensors"], ["finetune", "\x1b]0;x\x07"], ["recipes", "show", "\x9b2J"],
        ["fit", "demo", "--kind", "\x1b[31m"],
    ],
)  # fmt: skip
def test_arguments_are_shown_as_text(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["liftkit", *arguments])
    with pytest.raises(SystemExit) as found:
        run()
    assert found.value.code == 2
    said = capsys.readouterr()
    assert not controls(said.out + said.err)
    assert "fault of liftkit" not in said.err


def test_names_in_a_recipe_are_shown_as_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "e.yaml"
    recipe.write_text('model: "\\e[2J\\e]0;pwn\\a"\n"k\\e[31m": 1\n')
    monkeypatch.setattr(sys, "argv", ["liftkit", "finetune", str(recipe), "--dry-run"])
    with pytest.raises(SystemExit):
        run()
    said = capsys.readouterr()
    assert not controls(said.out + said.err)
    assert "\\x1b[31m" in said.err


def test_json_is_of_printing_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    console.begin()
    console.result(output=NASTY)
    text = console.answer_text(0)
    assert not controls(text)
    assert json.loads(text)["output"] == NASTY
    console.begin()
