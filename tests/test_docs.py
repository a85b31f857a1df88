"""The documentation cannot rot: its commands run, its links lead somewhere, its options exist."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from liftkit.cli.app import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "CHANGELOG.md"]
Cli = Callable[..., tuple[int, str, str]]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def commands() -> list[list[str]]:
    lines = (line for page in PAGES for block in blocks(page, "bash") for line in block.splitlines())
    return [shlex.split(line, comments=True) for line in lines if line.startswith("liftkit")]


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which the documentation's relative paths hold."""
    (tmp_path / "liftkit").symlink_to(ROOT / "liftkit")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_commands_on_the_embedded_model_run(cli: Cli, checkout: Path) -> None:
    ran = set()
    for command in commands():
        if command[1] == "doctor" or any(word.startswith(("liftkit/assets", "tiny-")) for word in command):
            code, _, err = cli(*command[1:])
            assert code == 0, (command, err)
            ran.add(command[1])
    # The demo finetunes for a minute; make demo runs it.
    assert ran == typer.main.get_command(app).commands.keys() - {"demo"}  # type: ignore[attr-defined]
    assert (checkout / "grid.png").exists()


def test_commands_and_options_that_are_shown_exist() -> None:
    known = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert commands()
    for command in commands():
        if len(command) < 2 or command[1].startswith("-"):
            continue
        options = {
            name for parameter in known[command[1]].params for name in (*parameter.opts, *parameter.secondary_opts)
        }
        assert {word for word in command if word.startswith("-")} <= options | {"--help"}, command
    text = " ".join(page.read_text() for page in PAGES)
    options = {name for sub in known.values() for parameter in sub.params for name in parameter.opts}
    assert set(re.findall(r"`(--[a-z-]+)", text)) <= options | {"--debug"}


def test_python_that_is_shown_runs(checkout: Path) -> None:
    for block in blocks(ROOT / "README.md", "python"):
        exec(compile(block, "README.md", "exec"), {})


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_readme_shows_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text()
    assert re.search(r"^make demo\b", text, re.MULTILINE)
    assert re.search(r"^make test\b", text, re.MULTILINE)
