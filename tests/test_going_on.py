"""Runs that are killed, stopped or resumed: they go on to the last bit, and say what changed."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from liftkit.errors import LiftkitError, UsageError
from liftkit.finetune.learner import Learner
from liftkit.finetune.run import finetune
from liftkit.finetune.state import checkpoints
from tests.alignment import liftkit_command
from tests.training import Watch, rows


def assert_same_run(a: Path, b: Path) -> None:
    """Weights, running mean, optimizer, discriminators, losses, validation and previews, to the last bit."""
    assert rows(a) == rows(b)
    (step, last), (_, other) = checkpoints(a / "checkpoints")[-1], checkpoints(b / "checkpoints")[-1]
    assert step == 6
    for stem in ("parameters", "average", "optimizer", "adversary"):
        mine, theirs = load_file(last / f"{stem}.safetensors"), load_file(other / f"{stem}.safetensors")
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine), stem
    previews = sorted((a / "previews").iterdir())
    assert previews
    assert all(path.read_bytes() == (b / "previews" / path.name).read_bytes() for path in previews)


def test_a_run_killed_and_resumed_equals_one_that_was_not(make, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """To the last bit, across processes: the same machine, as many threads, and weights that lie in memory as they did."""
    whole = finetune(make("whole"))
    assert whole.outcome.step == 6
    recipe = make("killed")
    process = subprocess.Popen(
        [*liftkit_command(pytestconfig.getoption("--misaligned")), "finetune", str(tmp_path / "killed.yaml")],
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        cwd=Path(__file__).parents[1],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    log = recipe.output / "log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and '"step": 4' in log.read_text()) and time.monotonic() < deadline:
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert [step for step, _ in checkpoints(recipe.output / "checkpoints")] == [3]
    finetune(recipe, resume="latest")
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    results = [
        (tmp_path / name / "model" / "transformer" / "diffusion_pytorch_model.safetensors")
        for name in ("whole", "killed")
    ]
    assert results[0].read_bytes() == results[1].read_bytes()


def test_ctrl_c_and_stop_files_save_first_and_lose_nothing(make, tmp_path: Path) -> None:
    finetune(make("whole"))
    first = make("parts")
    stopped = finetune(first, observer=Watch(lambda step: signal.raise_signal(signal.SIGINT) if step == 2 else None))
    assert stopped.outcome.stopped
    assert stopped.outcome.step == 2
    assert stopped.result is None

    def touch(step: int) -> None:
        if step == 2:
            (first.output / "stop").touch()

    assert finetune(first, resume="latest", observer=Watch(touch)).outcome.step == 4
    assert not (first.output / "stop").exists()
    assert finetune(first, resume=str(first.output / "checkpoints" / "step-0000004")).outcome.step == 6
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_touched_save_file_writes_a_checkpoint_and_rotation_keeps_the_newest(make) -> None:
    recipe = make(
        "saved", "checkpoints.every=1", "checkpoints.keep=2", "previews.every=0", "steps=4", "validation.every=0"
    )
    finetune(recipe, observer=Watch(lambda step: (recipe.output / "save").touch()))
    assert [step for step, _ in checkpoints(recipe.output / "checkpoints")] == [3, 4]
    assert not (recipe.output / "save").exists() or recipe.steps == 4


def test_resuming_from_nothing_or_in_another_run_is_an_error(make, cli, tmp_path: Path) -> None:
    recipe = make("nothing")
    with pytest.raises(UsageError, match="no complete checkpoint"):
        finetune(recipe, resume="latest")
    with pytest.raises(UsageError, match="no complete checkpoint"):
        finetune(recipe, resume=str(tmp_path))
    recipe.output.mkdir()
    (recipe.output / "log.jsonl").write_text("")
    code, _, stderr = cli("finetune", tmp_path / "nothing.yaml")
    assert code == 2
    assert "holds a run already" in stderr


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_last_good_checkpoint(make) -> None:
    recipe = make(
        "diverges", "checkpoints.every=1", "previews.every=0", "validation.every=0", "objective.adversarial=0"
    )

    def spoil(step: int) -> None:
        if step == 2:
            for parameter in watched["trainer"].learner.parameters.values():
                parameter.data.fill_(float("nan"))

    from liftkit.finetune import run

    watched: dict[str, Any] = {}
    prepare = run.prepare

    def remember(*arguments: Any) -> Any:
        watched["trainer"] = prepare(*arguments)
        return watched["trainer"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "prepare", remember)
        with pytest.raises(LiftkitError, match=r"step 3: the loss is nan; the last good checkpoint is .*step-0000002"):
            finetune(recipe, observer=Watch(spoil))


def test_gradients_that_are_not_finite_stop_the_run_before_the_weights_change(
    make, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make("overflows", "checkpoints.every=1", "previews.every=0", "validation.every=0")
    clip = Learner.clip

    def spoiled(learner: Learner, step: int) -> torch.Tensor:
        return clip(learner, step) if step < 2 else torch.tensor(float("inf"))

    monkeypatch.setattr(Learner, "clip", spoiled)
    with pytest.raises(
        LiftkitError, match=r"step 3: the gradient's norm is inf; the last good checkpoint is .*step-0000002"
    ):
        finetune(recipe)
    assert [step for step, _ in checkpoints(recipe.output / "checkpoints")] == [1, 2]


def test_going_back_sets_later_checkpoints_aside_and_rotation_keeps_the_new_ones(make) -> None:
    overrides = ("checkpoints={every: 1, keep: 2}", "previews.every=0", "validation.every=0")
    finetune(make("back", *overrides, "steps=3", "checkpoints.keep=3"))
    place = make("back").output / "checkpoints"
    watch = Watch()
    finetune(make("back", *overrides, "steps=2"), resume=str(place / "step-0000001"), observer=watch)
    assert [step for step, _ in checkpoints(place)] == [1, 2]
    assert sorted(path.name for path in place.glob("*.abandoned")) == [
        "step-0000002.abandoned",
        "step-0000003.abandoned",
    ]


def test_a_checkpoint_that_is_refused_leaves_the_record_of_the_run(make) -> None:
    recipe = make("kept", "steps=1", "checkpoints.every=1", "previews.every=0", "validation.every=0")
    finetune(recipe)
    before = (recipe.output / "recipe.yaml").read_text()
    other = make("kept", "trainable.rank=2", "steps=2", "previews.every=0", "validation.every=0")
    with pytest.raises(UsageError):
        finetune(other, resume="latest")
    assert (recipe.output / "recipe.yaml").read_text() == before
    (recipe.output / "checkpoints" / "step-0000001" / "state.json").write_text("{")
    with pytest.raises(UsageError, match=r"state\.json"):
        finetune(recipe, resume="latest")


def test_resuming_with_other_data_or_another_recipe_says_so(make, photos: Path) -> None:
    quick = ("batch_size=2", "previews.every=0", "validation.every=0", "objective.adversarial=0")
    source = f"data.sources=[{{kind: folder, path: {photos}}}]"
    recipe = make("others", source, "steps=1", *quick)
    finetune(recipe)
    same, other = Watch(), Watch()
    finetune(make("others", source, "steps=2", *quick), resume="latest", observer=same)
    (photos / "00.txt").write_text("another caption")
    finetune(make("others", source, "steps=3", *quick), resume="latest", observer=other)
    told = [[note for note in watch.notes if "not those that it was trained on" in note] for watch in (same, other)]
    assert told[0] == []
    (text,) = told[1]
    assert "step-0000002" in text
    assert [row["note"] for row in rows(recipe.output) if "note" in row] == [
        "steps was 1, it is 2 now",
        "images or captions are not those that it was trained on",
        "steps was 2, it is 3 now",
    ]
