"""What goes of a finished run, and what never does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from liftkit.checkpoint.lock import claim


def write(path: Path, size: int = 10) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(size))
    return path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The files of a finished run."""
    folder = tmp_path / "my run"
    for name in (
        "log.jsonl",
        "recipe.yaml",
        "model/liftkit.json",
        "previews/step-0000002.png",
        "model/transformer/a.safetensors",
    ):
        write(folder / name)
    (folder / "run.json").write_text(json.dumps({"format": "liftkit.run", "version": 1}))
    for step in ("step-0000001", "step-0000002", "step-0000003.abandoned"):
        write(folder / "checkpoints" / step / "state.json")
        write(folder / "checkpoints" / step / "parameters.safetensors", 1000)
    write(folder / "cache" / "files.json")
    write(folder / "cache" / "latents" / "0123" / "0.safetensors", 5000)
    write(folder / "cache" / "prompts" / "4567" / "0.safetensors", 500)
    return folder


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_checkpoints_and_cache_go_and_all_else_stays(run: Path, cli) -> None:
    before = files(run)
    code, stdout, stderr = cli("clean", run, "--dry-run")
    assert code == 0, stderr
    assert "6 files of checkpoints and 3 of the cache would go (8.5 kB)" in stdout
    assert files(run) == before
    code, stdout, stderr = cli("clean", run)
    assert code == 0, stderr
    assert "are gone (8.5 kB)" in stdout
    assert files(run) == {name for name in before if not name.startswith(("checkpoints/", "cache/"))}
    assert not (run / "checkpoints").exists()
    assert not (run / "cache").exists()
    assert cli("clean", run)[0] == 0


def test_what_the_run_did_not_make_stays(run: Path, tmp_path: Path, cli) -> None:
    elsewhere = write(tmp_path / "elsewhere" / "0.safetensors")
    mine = [
        write(run / "checkpoints" / "step-0000001" / "notes.txt"),
        write(run / "checkpoints" / "best" / "parameters.safetensors"),
        write(run / "cache" / "mine" / "x.safetensors"),
        write(run / "cache" / "portrait.png"),
    ]
    (run / "cache" / "latents" / "linked").symlink_to(elsewhere.parent)
    (run / "checkpoints" / "step-0000009").symlink_to(elsewhere.parent)
    code, _, stderr = cli("clean", run)
    assert code == 0, stderr
    assert elsewhere.is_file()
    assert all(path.is_file() for path in mine)
    assert not (run / "checkpoints" / "step-0000002").exists()


def test_a_folder_that_is_a_link_is_left_alone(run: Path, tmp_path: Path, cli) -> None:
    (run / "cache").rename(tmp_path / "shared")
    (run / "cache").symlink_to(tmp_path / "shared")
    assert cli("clean", run)[0] == 0
    assert len(files(tmp_path / "shared")) == 3


@pytest.mark.parametrize(
    ("gone", "words"),
    [(("run.json",), "no run of liftkit finetune"), (("model/liftkit.json",), "liftkit finetune --resume")],
)
def test_no_run_and_one_that_is_not_finished_are_refused(run: Path, cli, gone: tuple[str, ...], words: str) -> None:
    for name in gone:
        (run / name).unlink()
    before = files(run)
    code, _, stderr = cli("clean", run)
    assert (code, stderr.count("\n"), words in stderr) == (2, 2, True), stderr
    assert files(run) == before


def test_a_run_that_is_going_on_is_refused(run: Path, cli) -> None:
    import threading

    held, done = threading.Event(), threading.Event()

    def work() -> None:
        with claim(run, inside=True):
            held.set()
            done.wait(30)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert held.wait(30)
        before = files(run)
        code, _, stderr = cli("clean", run)
        assert code == 2, stderr
        assert files(run) == before
    finally:
        done.set()
        thread.join()
