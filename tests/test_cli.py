"""The command line itself: quick, lazy, documented."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Cli = Callable[..., tuple[int, str, str]]
HEAVY = ("torch", "diffusers", "transformers", "numpy", "sklearn", "scipy", "PIL", "huggingface_hub", "safetensors")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=60, check=False)


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
    code, _, err = cli("convert", "x", "--images", "demo", "-o", tmp_path / "out")
    assert code == 1
    assert "RuntimeError: sprocket" in err
    assert "--debug" in err
    assert "Traceback" not in err
    with pytest.raises(RuntimeError, match="sprocket"):
        cli("--debug", "convert", "x", "--images", "demo", "-o", tmp_path / "out")


def test_every_option_has_help() -> None:
    import typer

    from liftkit.cli.app import app

    command = typer.main.get_command(app)
    for name, sub in command.commands.items():  # type: ignore[attr-defined]
        assert sub.help
        assert "Example:" in sub.help, name
        for parameter in sub.params:
            assert getattr(parameter, "help", "") or parameter.name == "help", (name, parameter.name)
