"""The command line itself: quick, lazy, documented, completed."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from liftkit.cli.answers import KEYS
from tools.cli_reference import MARK, PAGE, about, commands, example, reference

Cli = Callable[..., tuple[int, str, str]]
HEAVY = ("torch", "diffusers", "transformers", "numpy", "sklearn", "scipy", "PIL", "huggingface_hub", "safetensors")


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["convert", "--help"], ["sample", "--help"], ["demo", "--help"]]
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    program = f"""
import sys
sys.argv = ["liftkit", *{arguments!r}]
from liftkit.cli import app
try:
    app.run()
except SystemExit as exit_:
    print("exit", exit_.code)
print("heavy", sorted(set(sys.modules) & set({HEAVY!r})))
"""
    done = run("-c", program)
    assert "exit 0" in done.stdout, done.stderr
    assert "heavy []" in done.stdout


@pytest.mark.parametrize("said", [{}, {"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "7"}])
def test_threads_wait_as_the_user_said_or_for_a_moment(said: dict[str, str]) -> None:
    from liftkit.cli.app import set_waiting

    environment = dict(said)
    set_waiting(environment)
    ours = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "5000"}
    assert environment == (said if "OMP_WAIT_POLICY" in said else ours | said)


def test_importing_liftkit_is_light_and_knows_its_names() -> None:
    done = run("-c", f"import sys, liftkit; print(sorted(set(sys.modules) & set({HEAVY!r}))); print(dir(liftkit))")
    assert done.stdout.startswith("[]"), done.stderr
    assert "fit_procrustes" in done.stdout
    import liftkit

    for name in liftkit.__all__:
        assert getattr(liftkit, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'lift_everything'"):
        liftkit.lift_everything  # noqa: B018


def test_cli_py_is_liftkit() -> None:
    done = run(str(Path(__file__).parents[1] / "cli.py"), "--version")
    assert done.returncode == 0
    assert done.stdout.startswith("liftkit ")


def test_a_fault_of_ours_is_one_line_and_debug_shows_the_traceback(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from liftkit.conversion import plan

    def broken(*arguments: object) -> None:
        raise RuntimeError("sprocket")

    monkeypatch.setattr(plan, "make_plan", broken)
    code, _, err = cli("convert", "demo", "--images", "demo", "-o", tmp_path / "out")
    assert code == 1
    assert "RuntimeError: sprocket" in err
    assert "--debug" in err
    assert "Traceback" not in err
    with pytest.raises(RuntimeError, match="sprocket"):
        cli("--debug", "convert", "demo", "--images", "demo", "-o", tmp_path / "out")


def test_every_option_has_help_and_every_command_an_answer() -> None:
    for command, context in commands():
        assert about(command), context.command_path
        for parameter in command.params:
            assert getattr(parameter, "help", "") or parameter.name == "help", (context.command_path, parameter.name)
    assert sorted(KEYS) == sorted(context.command_path.removeprefix("liftkit ") for _, context in commands())


def test_every_command_takes_quiet_and_json() -> None:
    for command, context in commands():
        flags = {option for parameter in command.params for option in parameter.opts}
        assert {"--quiet", "-q", "--json"} <= flags, context.command_path


@pytest.mark.parametrize(("command", "context"), [pytest.param(*each, id=each[1].command_path) for each in commands()])
def test_the_example_of_every_command_parses(command: Any, context: Any) -> None:
    """Options exist, values are among the choices, nothing is missing; typer raises otherwise."""
    path, words = context.command_path.split(), shlex.split(example(command))
    assert words[: len(path)] == path
    command.make_context(path[-1], words[len(path) :], parent=context.parent)


def test_the_reference_is_current() -> None:
    assert PAGE.read_text().partition(MARK)[2].lstrip("\n") == reference(), (
        "python -m tools.cli_reference makes it anew"
    )


def test_the_reference_has_every_option_with_its_choices_and_defaults() -> None:
    text = reference()
    for command, context in commands():
        section = text.partition(f"## {context.command_path}\n")[2].partition("\n## ")[0]
        for parameter in command.params:
            for name in parameter.opts:
                assert re.search(rf"{re.escape(parameter.metavar or name)}[ ,\n]", section), (
                    context.command_path,
                    name,
                )
        assert f"\n{example(command)}\n" in section
    assert re.search(r"^--scale \[norm\|lsq\] .*(\n +.*)?default: norm\]", text, re.MULTILINE)
    assert "[required]" in text
    assert re.search(r"\[env var:\s+LIFTKIT_QUIET\]", text)


def test_shells_complete_recipes_choices_and_commands() -> None:
    expected = {
        "liftkit finetune tiny": ["tiny-flux2", "tiny-klein"],
        "liftkit recipes show sd3": ["sd3.5-medium"],
        "liftkit convert x --kind p": ["procrustes", "pca"],
        "liftkit doc": ["doctor"],
    }
    program = f"""
import os, sys
sys.argv = ["liftkit"]
from liftkit.cli import app
for typed in {list(expected)!r}:
    os.environ |= {{"COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split()) - 1)}}
    try:
        app.run()
    except SystemExit:
        print("--")
"""
    done = run("-c", program, _LIFTKIT_COMPLETE="complete_bash")
    assert [each.split() for each in done.stdout.split("--")] == [*expected.values(), []], done.stderr


@pytest.mark.parametrize(("command", "context"), [pytest.param(*each, id=each[1].command_path) for each in commands()])
def test_help_at_80_columns_is_whole_and_in_full_sentences(
    command: Any, context: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    printed = command.get_help(context)
    assert max(map(len, printed.splitlines())) <= 80
    assert "…" not in printed
    assert not re.search(r"<[^>]*>|x[<>]=|[<>]=x", printed), "types and inequalities are for programs"
    for parameter in command.params:
        for name in (*parameter.opts, *parameter.secondary_opts):
            shown = name if name.startswith("-") else parameter.metavar
            assert re.search(rf"(?<!\S){re.escape(shown)}(?![\w-])", printed), name
        about = parameter.help.strip()
        assert re.match(r"[A-Z]", about), about
        assert about.endswith("."), about
        assert not about.startswith(("Of ", "Of the")), about
        flag = getattr(parameter, "is_flag", False)
        assert flag or parameter.metavar, parameter.name


@pytest.mark.parametrize(("command", "context"), [pytest.param(*each, id=each[1].command_path) for each in commands()])
def test_every_option_that_may_be_left_out_shows_its_default(command: Any, context: Any) -> None:
    for parameter in command.params:
        if not parameter.required and not getattr(parameter, "is_flag", False) and parameter.opts[0].startswith("-"):
            assert "default: " in parameter.get_help_record(context)[1], parameter.opts


def test_the_list_of_commands_is_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    context = next(commands())[1].parent
    assert "..." not in context.command.get_help(context).partition("Commands:")[2]


def test_the_demo_ends_in_the_lines_that_a_person_wants(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from types import SimpleNamespace as Made

    def scored(key: str, role: str, label: str, value: float) -> Made:
        return Made(key=key, role=role, label=label, score=Made(figures={"digit": value, "laplacian": 2 * value}))

    rows = [scored("real", "real", "real", 1.0), scored("base", "control", "base", 0.9)]
    rows += [scored("unsharp", "control", "sharp", 0.8), scored("pixel-1", "pixel", "[converted]", 0.7)]
    comparison = Made(count=128, rows=rows, to_dict=dict)
    made = Made(plan=None, output=tmp_path / "pixel")
    result = Made(
        conversion=made, finetuned=None, comparison=comparison, picture=tmp_path / "a.png", page=tmp_path / "a.html"
    )
    monkeypatch.setattr("liftkit.demo.run", lambda *arguments, **more: result)
    monkeypatch.setattr("liftkit.cli.answers.plan_data", lambda plan: {})
    monkeypatch.setattr("liftkit.cli.answers.conversion_data", lambda conversion: {})
    code, out, _ = cli("demo", "-o", tmp_path)
    assert code == 0
    lines = out.splitlines()
    assert len(lines) == 6
    assert " ".join(lines[0].split()) == "128 samples; better: digits up colors up grain near 1 sharp near 1"
    assert lines[1].startswith("before: latent model")
    assert lines[2].startswith("after: [converted]")
    assert [line.split()[0] for line in lines[3:]] == ["picture", "page", "next"]
    assert str(tmp_path / "a.png") in lines[3]
