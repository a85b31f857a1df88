"""``--json`` and ``--quiet``: one object or nothing, before the command or after it, whatever happens."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from liftkit.cli.answers import ALWAYS, KEYS

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def ask(cli: Cli) -> Callable[..., tuple[int, dict[str, Any]]]:
    """Run a command with ``--json`` before it; exit code and object, which is all that stands on stdout."""

    def run(*arguments: object) -> tuple[int, dict[str, Any]]:
        code, out, _ = cli("--json", *arguments)
        assert out.count("\n") == 1
        answer = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
        assert list(answer)[:2] == ["command", "ok"]
        assert answer["ok"] == (code == 0) == ("error" not in answer)
        assert answer.get("exit_code", 0) == code
        if answer["command"] is not None:
            assert answer.keys() <= KEYS[answer["command"]].keys() | ALWAYS.keys()
        return code, answer

    return run


Ask = Callable[..., tuple[int, dict[str, Any]]]


def keys(answer: dict[str, Any]) -> set[str]:
    return set(answer) - set(ALWAYS)


def documented(command: str, *absent: str) -> set[str]:
    return set(KEYS[command]) - set(absent)


@pytest.fixture(scope="module")
def conversion(model_folders: dict[str, Path], image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One conversion with everything that it leaves in memory."""
    import liftkit

    folder = tmp_path_factory.mktemp("answers") / "pixel"
    return liftkit.convert(
        str(model_folders["flux2"]), folder, images=str(image_folder), num_images=10, proof_steps=2, device="cpu"
    )


def test_a_conversion_answers_with_its_plan_and_report(
    ask: Ask, conversion: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("liftkit.conversion.execute.execute", lambda plan, observer: conversion)
    arguments = ("convert", conversion.plan.model.path, "-o", tmp_path / "new", "--images", "demo", "--device", "cpu")
    code, answer = ask(*arguments)
    assert code == 0
    assert keys(answer) == documented("convert", "pushed")
    assert answer["plan"]["rank"] == conversion.lift.rank
    assert answer["plan"]["options"]["device"] == "cpu"
    assert answer["report"]["proof"]["exact"] == conversion.proof.exact
    assert answer["output"] == str(conversion.output)
    code, answer = ask(*arguments, "--dry-run")
    assert keys(answer) == {"dry_run", "plan"}
    assert answer["dry_run"] is True
    assert not list(tmp_path.iterdir())


def test_a_fit_its_report_and_a_comparison_of_two(
    ask: Ask, conversion: Any, tmp_path: Path, image_folder: Path
) -> None:
    model = conversion.plan.model.path
    few = ("--images", image_folder, "--num-images", 10, "--device", "cpu")
    code, fitted = ask("fit", model, *few, "-o", tmp_path / "lift.safetensors")
    assert code == 0
    assert keys(fitted) == documented("fit")
    assert fitted["images"] == 10
    code, answer = ask("report", tmp_path / "lift.safetensors")
    assert keys(answer) == documented("report")
    assert answer["report"] == fitted["report"]
    assert answer["other"] is answer["angles"] is None
    _, answer = ask("report", conversion.output, "--compare", tmp_path / "lift.safetensors")
    assert answer["other"] == fitted["report"]
    assert answer["angles"] == sorted(answer["angles"])
    code, answer = ask("fit", model, *few, "--moments-out", tmp_path / "moments.safetensors")
    assert keys(answer) == documented("fit", "report")
    assert answer["output"] == str(tmp_path / "moments.safetensors")


def test_verify_says_what_is_wrong(ask: Ask, conversion: Any) -> None:
    assert ask("verify", conversion.output)[1]["checks"][0]["ok"]
    added = conversion.output / "added"
    added.write_text("")
    try:
        code, answer = ask("verify", conversion.output)
    finally:
        added.unlink()
    assert code == 1
    assert keys(answer) == documented("verify")
    assert answer["error"] == "manifest: added: not in the manifest"
    assert answer["checks"][0]["problems"] == ["added: not in the manifest"]


def test_recipes(ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _, answer = ask("recipes", "list")
    assert keys(answer) == documented("recipes list")
    assert {"name", "summary", "path"} == answer["recipes"][0].keys()
    _, answer = ask("recipes", "show", "tiny-klein")
    assert keys(answer) == documented("recipes show")
    assert answer["text"] == Path(answer["path"]).read_text()
    _, answer = ask("recipes", "copy", "tiny-klein", "mine.yaml")
    assert keys(answer) == documented("recipes copy")
    assert Path("mine.yaml").read_text() == Path(answer["path"]).read_text()


def test_a_finetune_and_one_that_was_stopped(ask: Ask, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    speed = SimpleNamespace(seconds=4.0, steps=8, flops=0.0)
    trainer = SimpleNamespace(speed=speed, accelerator=SimpleNamespace(is_main_process=True, device="cpu"))
    outcome = SimpleNamespace(step=8, seconds=5.0, stopped=False, signal=2)
    done = SimpleNamespace(outcome=outcome, result=tmp_path / "model", trainer=trainer, tallies=[])
    monkeypatch.setattr("liftkit.finetune.run.finetune", lambda recipe, resume, observer: done)
    arguments = ("finetune", "tiny-klein", "-o", tmp_path / "run", "batch_size=32", "micro_batch=null")
    code, answer = ask(*arguments)
    assert code == 0
    assert keys(answer) == documented("finetune", "recipe", "estimate", "pushed")
    assert (answer["seconds_per_step"], answer["images_per_second"], answer["tflops"]) == (0.5, 64.0, None)
    outcome.stopped, done.result, speed.steps = True, None, 0
    code, answer = ask(*arguments)
    after = "interrupted; no step was saved yet, the same command starts again"
    assert (code, answer["error"], answer["result"], answer["seconds_per_step"]) == (130, after, None, None)
    monkeypatch.setattr(
        "liftkit.finetune.dry_run.describe", lambda recipe, observer, resume, memory: [("A step", [("images", "9")])]
    )
    code, answer = ask(*arguments, "--dry-run")
    assert keys(answer) == {"dry_run", "output", "recipe", "estimate"}
    assert answer["recipe"]["batch_size"] == 32
    assert answer["estimate"] == {"A step": {"images": "9"}}


def test_comparisons_and_the_demo(ask: Ask, conversion: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from liftkit.demo import Demonstration
    from liftkit.evaluate.comparison import Comparison

    found = Comparison([], [], [], 8, {"reference": 16}, ["a note"], {"guidance": float("nan")})
    monkeypatch.setattr("liftkit.evaluate.plan.prepare", lambda options: None)
    monkeypatch.setattr("liftkit.evaluate.compare.execute", lambda plan, observer: found)
    _, answer = ask("compare", "demo", "demo")
    assert keys(answer) == documented("compare")
    assert answer["comparison"]["notes"] == ["a note"]
    # JSON has no word for it.
    assert answer["comparison"]["settings"] == {"guidance": None}

    def demonstrate(output: Path, **choices: Any) -> Demonstration:
        return Demonstration("tiny-klein", conversion, None, found, tmp_path / "demo.png", tmp_path / "demo.html")

    monkeypatch.setattr("liftkit.demo.run", demonstrate)
    _, answer = ask("demo")
    assert keys(answer) == documented("demo")


def test_pictures_and_self_generated_data(ask: Ask, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch

    from liftkit.evaluate.generate import Generated

    model = SimpleNamespace(index={"_class_name": "Pipeline"}, name="a model")
    monkeypatch.setattr("liftkit.checkpoint.model.find_model", lambda folder: model)
    pipeline = SimpleNamespace(default=lambda argument: None, settings=lambda *arguments: {})
    monkeypatch.setattr("liftkit.models.loaded.load_pipeline", lambda *arguments, **choices: pipeline)
    monkeypatch.setattr("liftkit.models.editing.check_pictures", lambda *arguments: None)
    monkeypatch.setattr("liftkit.models.sampling.check_options", lambda *arguments: None)
    monkeypatch.setattr(
        "liftkit.models.sampling.sample", lambda pipeline, prompts, options, **more: torch.zeros(len(prompts), 3, 8, 8)
    )
    options = ("-n", 3, "--seed", 5, "--device", "cpu")
    _, answer = ask("sample", "demo", "-p", "a", "-p", "b", *options, "-o", tmp_path / "grid.png")
    assert keys(answer) == documented("sample")
    assert (answer["prompts"], answer["seeds"], answer["count"]) == (["a", "b", "a"], [5, 6, 7], 3)
    assert (tmp_path / "grid.png").exists()
    monkeypatch.setattr("liftkit.evaluate.generate.generate", lambda *arguments: Generated(tmp_path / "data", 2, 1))
    _, answer = ask("generate", "demo", "--prompts", "demo", *options, "-o", tmp_path / "data")
    assert keys(answer) == documented("generate")


def test_imports_and_exports_and_where_they_were_pushed(
    ask: Ask, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    adapter = SimpleNamespace(tensors={}, full=[], pairs=[], base="x")
    done = SimpleNamespace(adapter=adapter, residual=None)
    monkeypatch.setattr("liftkit.formats.kinds.kind_of", lambda source: "adapter")
    monkeypatch.setattr("liftkit.cli.import_._adapter", lambda *arguments: None)
    monkeypatch.setattr("liftkit.formats.exporting.export_adapter", lambda *arguments, **choices: done)
    monkeypatch.setattr("liftkit.hub.check_push", lambda repo, private: None)
    monkeypatch.setattr("liftkit.hub.push", lambda folder, repo, private, observer: f"https://hub/{repo}")
    options = (tmp_path, "-o", tmp_path / "out", "--push", "me/it")
    _, answer = ask("import", *options, "--base", tmp_path)
    assert keys(answer) == documented("import", "tally")
    _, answer = ask("export", *options, "--format", "asymflow-adapter")
    assert keys(answer) == documented("export")
    assert answer["pushed"] == "https://hub/me/it"


@pytest.mark.parametrize(
    ("arguments", "command", "code", "error"),
    [
        (["--json", "convert", "--bogus"], "convert", 2, "No such option: --bogus"),
        (["convert", "--bogus", "--json"], "convert", 2, "No such option: --bogus"),
        (["convert", "--json"], "convert", 2, "Missing argument"),
        (["recipes", "show", "--json", "a", "b"], "recipes show", 2, "unexpected extra argument"),
        (["--json", "convort"], None, 2, "Did you mean 'convert'?"),
        (["recipes", "show", "zzz", "--json"], "recipes show", 2, "zzz: no recipe of that name"),
        (["--json", "report", "/none"], "report", 2, "/none: no such file or folder"),
    ],
)
def test_errors_are_answers_too(arguments: list[str], command: str | None, code: int, error: str, cli: Cli) -> None:
    found, out, err = cli(*arguments)
    answer = json.loads(out)
    assert error in answer.pop("error")
    assert answer == {"command": command, "ok": False, "exit_code": code}
    assert found == code
    assert error.split()[-1] in err


def test_faults_and_interruptions_are_answers_too(ask: Ask, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(error: BaseException) -> Callable[[], Any]:
        def fail() -> Any:
            raise error

        return fail

    monkeypatch.setattr("liftkit.finetune.shipped.shipped_recipes", failing(RuntimeError("sprocket")))
    code, answer = ask("recipes", "list")
    assert code == 1
    assert "RuntimeError: sprocket (this is a fault of liftkit; run with --debug" in answer["error"]
    with pytest.raises(RuntimeError, match="sprocket"):
        cli("--json", "--debug", "recipes", "list")
    monkeypatch.setattr("liftkit.finetune.shipped.shipped_recipes", failing(KeyboardInterrupt()))
    after = "interrupted; the same command starts again"
    assert ask("recipes", "list") == (
        130, {"command": "recipes list", "ok": False, "error": after, "exit_code": 130},
    )  # fmt: skip


def test_what_libraries_print_does_not_reach_stdout(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def chatty() -> dict[str, Path]:
        print("a banner")
        sys.stdout.write("another\n")
        return {}

    monkeypatch.setattr("liftkit.finetune.shipped.shipped_recipes", chatty)
    _, out, err = cli("recipes", "list", "--json")
    assert json.loads(out) == {"command": "recipes list", "ok": True, "recipes": []}
    assert "a banner\nanother\n" in err
    assert "Recipes" in err


def test_quiet_prints_errors_alone_and_writes_all_the_same(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, conversion: Any, image_folder: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    model, few = conversion.plan.model.path, ("--images", image_folder, "--num-images", 10, "--device", "cpu")
    assert cli("fit", model, *few, "-o", "lift.safetensors", "-q") == (0, "", "")
    assert Path("lift.safetensors").exists()
    assert cli("--quiet", "report", "lift.safetensors", "--html", "page.html") == (0, "", "")
    assert Path("page.html").exists()
    code, out, err = cli("-q", "report", "none")
    assert (code, out) == (2, "")
    assert err.startswith("error: none: ")
    # What one run chose is nothing to the next.
    assert "lift" in cli("report", "lift.safetensors")[1]
    monkeypatch.setenv("LIFTKIT_QUIET", "1")
    assert cli("report", "lift.safetensors") == (0, "", "")


def test_progress_is_drawn_unless_it_is_quiet(cli: Cli, conversion: Any) -> None:
    assert "verify: checksums" in cli("verify", conversion.output)[2]
    assert cli("verify", conversion.output, "--quiet") == (0, "", "")
    code, out, err = cli("verify", conversion.output, "--quiet", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["ok"]


def test_help_and_version_are_what_they_are(cli: Cli) -> None:
    assert cli("--json", "--version")[1].startswith("liftkit ")
    assert "Usage" in cli("--json", "recipes", "list", "--help")[1]


def test_of_many_processes_the_first_one_answers(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert cli("recipes", "list", "--json", "-q") == (0, "", "")
    monkeypatch.setenv("RANK", "0")
    assert json.loads(cli("recipes", "list", "--json", "-q")[1])["ok"]


def test_the_figures_of_a_report_go_to_a_file_as_ever(cli: Cli, conversion: Any, tmp_path: Path) -> None:
    code, out, _ = cli("--json", "report", conversion.output, "--json", tmp_path / "figures.json")
    assert code == 0
    assert json.loads(out)["report"] == json.loads((tmp_path / "figures.json").read_text())
