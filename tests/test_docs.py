"""The documentation cannot rot: its commands run, its links lead somewhere, its options exist."""

from __future__ import annotations

import re
import shlex
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.commands.launch import launch_command_parser

import liftkit
from liftkit.cli.app import app
from tools import faults

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
TUTORIAL = ROOT / "docs" / "tutorial.md"
SHORTER = [
    (r"\bsteps=\d+", "steps=2"),
    (r"--steps \d+", "--steps 2"),
    (r"--images 256", "--images 32"),
    (r"-n 6", "-n 2"),
]
"""What makes the tutorial's commands quick."""
Cli = Callable[..., tuple[int, str, str]]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def commands(pages: list[Path] = PAGES) -> list[list[str]]:
    lines = (line for page in pages for block in blocks(page, "bash") for line in block.splitlines())
    return [shlex.split(line, comments=True) for line in lines if line.startswith("liftkit")]


def chains() -> list[list[list[str]]]:
    """The commands on the embedded model, in the order of the pages, together where they name the same files: what one of
    a chain writes, the next ones read. Chains know nothing of each other and run in parallel."""
    found: list[tuple[set[str], list[list[str]]]] = []
    for command in commands([page for page in PAGES if page != TUTORIAL]):
        names = set(re.findall(r"\btiny-[a-z]+", " ".join(command)))
        if command[1] not in ("doctor", "models") and not names and "liftkit/assets" not in " ".join(command):
            continue
        # The embedded model and its recipe are there from the beginning.
        names -= {"tiny-klein"}
        linked = [chain for chain in found if chain[0] & names]
        found = [chain for chain in found if chain not in linked]
        found.append((names.union(*(each for each, _ in linked)), [*(c for _, many in linked for c in many), command]))
    return [many for _, many in found]


def test_launches_have_options_that_accelerate_knows(tmp_path: Path) -> None:
    """Several GPUs, and two nodes by options or by a file."""
    texts = [page.read_text() for page in (*PAGES, *sorted((ROOT / "recipes").glob("*.yaml")))]
    lines = [line for text in texts for line in re.findall(r"^(?:# +)?(accelerate launch .*)", text, re.MULTILINE)]
    assert len(lines) > 12
    found = [launch_command_parser().parse_args(shlex.split(line, comments=True)[2:]) for line in lines]
    assert {(each.num_machines, each.num_processes) for each in found} >= {(None, 2), (None, 8), (2, 16)}
    for each in found:
        assert (each.module, each.training_script) == (True, "liftkit")
        assert each.training_script_args[0] == "finetune"
    (config,) = (block for page in PAGES for block in blocks(page, "yaml") if "distributed_type" in block)
    (tmp_path / "nodes.yaml").write_text(config)
    assert ClusterConfig.from_yaml_file(str(tmp_path / "nodes.yaml")).num_machines == 2


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which the documentation's relative paths hold."""
    (tmp_path / "liftkit").symlink_to(ROOT / "liftkit")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("chain", chains(), ids=lambda chain: " ".join(chain[0][1:3]))
def test_commands_on_the_embedded_model_run(chain: list[list[str]], cli: Cli, checkout: Path) -> None:
    for command in chain:
        code, _, err = cli(*command[1:])
        assert code == 0, (command, err)
        if command[1] == "sample":
            assert (checkout / command[command.index("-o") + 1]).exists()


def tutorial(text: str) -> list[list[str]]:
    """The commands of a part of the tutorial, each made quick."""
    found = []
    for line in "".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).splitlines():
        for long, short in SHORTER:
            line = re.sub(long, short, line)
        found.append(shlex.split(line + (" -n 8 --steps 2" if "--quick" in line else "")))
    return found


@pytest.mark.parametrize(
    "part", ["convert", *(pytest.param(each, marks=pytest.mark.slow) for each in ("whole", "gallery"))]
)
def test_the_tutorial_runs_word_by_word(part: str, cli: Cli, checkout: Path) -> None:
    model, gallery = TUTORIAL.read_text().split("a gallery\n")
    todo = tutorial(model if part == "whole" else model.split("## 4. Finetune")[0])
    if part == "gallery":
        todo += tutorial(gallery)
    for line in todo:
        if line[0] != "liftkit":
            subprocess.run([*faults.PROGRAMS[line[0]], *line[1:]], check=True)
        else:
            code, _, err = cli(*line[1:])
            assert code == 0, (line, err)
    made = ["mine.html", "before.png", *(["after.png", "compare.html", "runs/mine/model"] if part == "whole" else [])]
    assert [name for name in made if not (checkout / name).exists()] == []


def test_the_gallery_of_faults_is_made_by_the_tutorials_commands() -> None:
    made = {line[line.index("-o") + 1] if "-o" in line else line[-1] for line in faults.commands()}
    assert {fault.model.removesuffix("/model") for fault in faults.FAULTS} <= made


def test_every_command_is_shown_on_the_embedded_model() -> None:
    shown = {command[1] for chain in chains() for command in chain}
    # The demo finetunes for a minute, and make demo runs it; a page is served until it is ended, and has tests of its own.
    assert shown == typer.main.get_command(app).commands.keys() - {"demo", "try"}  # type: ignore[attr-defined]


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
    parameters = [parameter for sub in known.values() for parameter in sub.params]
    options = {name for parameter in parameters for name in (*parameter.opts, *parameter.secondary_opts)}
    assert set(re.findall(r"`(--[a-z-]+)", text)) <= options | {"--debug"}


@pytest.mark.parametrize("page", ["README.md", "docs/api.md", "docs/try.md"])
def test_python_that_is_shown_runs(page: str, checkout: Path) -> None:
    names: dict[str, object] = {}
    for block in blocks(ROOT / page, "python"):
        exec(compile(block, page, "exec"), names)


def test_every_public_name_is_documented() -> None:
    text = (ROOT / "docs" / "api.md").read_text()
    missing = [name for name in liftkit.__all__ if f"`{name}" not in text]
    assert missing == []


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_floors_in_contributing_are_those_that_are_checked() -> None:
    checked = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]["layers"]
    rows = re.findall(r"^\| (.*?) \| .*\|$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    floors = [set(re.findall(r"`(\w+)(?:/|\.py)`", row)) for row in rows][-len(checked) :]
    for found, layer in zip(floors[:-1], checked[:-1], strict=True):
        assert found == {name for name in re.split(r" [:|] ", layer) if name != "__main__"}
    for floor in floors:
        assert all((ROOT / "liftkit" / name).is_dir() or (ROOT / "liftkit" / f"{name}.py").is_file() for name in floor)


def test_readme_shows_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text()
    assert re.search(r"^make demo\b", text, re.MULTILINE)
    assert re.search(r"^make test\b", text, re.MULTILINE)
