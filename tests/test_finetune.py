"""Training runs: exact resumption, what they leave, how they stop and how they fail."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import constants
from safetensors.torch import load_file

from liftkit.checkpoint.model import find_model
from liftkit.data import demo
from liftkit.embedded import TINY_KLEIN
from liftkit.errors import LiftkitError, UsageError
from liftkit.finetune.encoders import text_fingerprint
from liftkit.finetune.learner import Learner
from liftkit.finetune.network import Network, connect
from liftkit.finetune.recipe import Recipe
from liftkit.finetune.recipe_file import load_recipe
from liftkit.finetune.run import finetune
from liftkit.finetune.state import checkpoints
from liftkit.finetune.trainee import open_trainee
from liftkit.models.adapted import load_pixel_pipeline
from liftkit.models.adapter import Adapter
from liftkit.progress import Silent
from tests.alignment import liftkit_command
from tests.test_hub import FakeHub

TEXT = """
model: {model}
output: {output}
data:
  sources: [{{kind: demo, count: 24}}]
  cache: {cache}
  workers: 1
steps: 6
batch_size: 4
precision: "no"
threads: {threads}
trainable: {{rank: 4, dropout: 0.1}}
optimizer: {{name: muon, learning_rate: 2e-3, warmup: 2, multipliers: {{proj_out: 3}}}}
noise: {{shift: 1.0}}
objective: {{adversarial: 0.1}}
ema: {{start: 1}}
checkpoints: {{every: 3}}
previews: {{every: 3, count: 2, steps: 2}}
validation: {{every: 3, images: 4, quantiles: 2}}
"""


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Encoded once for all runs."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def make(pixel_klein: Path, cache: Path, tmp_path: Path):
    """Recipes of a few steps; overrides as on the command line."""

    def recipe(name: str, *overrides: str) -> Recipe:
        file = tmp_path / f"{name}.yaml"
        threads = torch.get_num_threads()
        file.write_text(TEXT.format(model=pixel_klein, output=tmp_path / name, cache=cache, threads=threads))
        return load_recipe(file, overrides)

    return recipe


class Watch(Silent):
    """Calls a function after each step; keeps what it is told."""

    def __init__(self, after: Any = lambda step: None) -> None:
        self.after, self.steps = after, 0
        self.notes: list[str] = []
        self.text = ""

    def note(self, text: str) -> None:
        self.notes.append(text)

    def status(self, text: str) -> None:
        self.steps, self.text = self.steps + 1, text
        self.after(self.steps)


def rows(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in found]


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


def test_micro_batches_add_up_to_the_whole_batch(make) -> None:
    quick = ("steps=2", "previews.every=0", "validation.every=0", "objective.adversarial=0", "trainable.dropout=0")
    one = rows(finetune(make("one", *quick)).trainer.folder.path)
    two = rows(finetune(make("two", *quick, "micro_batch=2")).trainer.folder.path)
    for a, b in zip(one, two):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=1e-4)


def test_the_result_is_a_folder_that_the_stock_loader_opens_and_the_adapter_says_the_same(
    make, pixel_klein: Path
) -> None:
    quick = ("steps=2", "previews.every=0", "validation.every=0")
    model = finetune(make("model", *quick)).result
    adapter = finetune(make("adapter", *quick, "save=adapter")).result
    assert model is not None
    assert adapter is not None
    # In the dtype that the base is stored in, for both round once to it.
    pipeline = DiffusionPipeline.from_pretrained(model, dtype=torch.bfloat16)
    assert type(pipeline.transformer).__name__ == "AsymFlux2Transformer2DModel"
    merged = pipeline.transformer.state_dict()
    before = load_file(pixel_klein / "transformer" / "diffusion_pytorch_model.safetensors")
    assert any(not torch.equal(merged[name].float(), before[name].float()) for name in before)
    for base in (TINY_KLEIN, pixel_klein):
        loaded = DiffusionPipeline.from_pretrained(base, dtype=torch.bfloat16)
        applied = load_pixel_pipeline(loaded, Adapter.load(adapter)).transformer
        assert all(
            torch.equal(value, merged[name]) for name, value in applied.state_dict().items() if name != "lift.basis"
        )
    record = json.loads((model / "liftkit.json").read_text())
    assert record["finetune"]["steps"] == 2
    assert str(pixel_klein.parent) not in (model / "liftkit.json").read_text()
    assert adapter.stat().st_size < 1e6


@pytest.mark.parametrize(
    ("overrides", "learns"),
    [
        (("space=latent", "objective.loss=flow", "objective.adversarial=0", "model=demo"), "Flux2Transformer2DModel"),
        (("init=random", "trainable.mode=full", "objective.loss=flow"), "AsymFlux2Transformer2DModel"),
        (("trainable.mode=full", "optimizer.name=adamw"), "AsymFlux2Transformer2DModel"),
    ],
)
def test_controls_and_full_training_run(make, overrides: tuple[str, ...], learns: str) -> None:
    done = finetune(
        make("control", *overrides, "steps=2", "previews.every=0", "validation.every=0", "optimizer.multipliers={}")
    )
    assert type(done.trainer.trainee.transformer).__name__ == learns
    assert done.result is not None
    assert DiffusionPipeline.from_pretrained(done.result).transformer is not None


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


def test_the_reference_stays_as_it_is_whatever_learns(make) -> None:
    recipe = make("frozen", "trainable.modules=[x_embedder, proj_out, norm_out, context_embedder]")
    trainee = open_trainee(recipe, find_model(recipe.model))
    _, latent = connect(trainee.transformer, trainee.network)
    assert latent is not None
    prompts = {"encoder_hidden_states": torch.ones(1, 2, trainee.transformer.config.joint_attention_dim)}
    side = 4 * trainee.spec.latent_patch(latent.config)
    state, sigma = torch.ones(1, latent.channels, side, side), torch.tensor([0.5])
    with torch.no_grad():
        before = latent.velocity(state, sigma, **prompts)
        for parameter in trainee.parameters.values():
            parameter.mul_(1.5)
        assert torch.equal(latent.velocity(state, sigma, **prompts), before)


def test_opening_what_does_not_learn_is_refused(make) -> None:
    recipe = make("shut", "trainable.modules=[proj_out, norm_out]", "trainable.open=1", "optimizer.multipliers={}")
    with pytest.raises(UsageError, match=r"trainable.open: 1.0: x_embedder does not learn"):
        open_trainee(recipe, find_model(recipe.model))


def test_another_text_encoder_of_the_same_size_is_told_apart(pixel_klein: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(pixel_klein, tmp_path / "other", symlinks=False)
    before = text_fingerprint(find_model(str(copied)), "cpu")
    assert before == text_fingerprint(find_model(str(pixel_klein)), "cpu")
    assert before == text_fingerprint(find_model(str(copied)), "cpu:0")
    assert before != text_fingerprint(find_model(str(copied)), "cuda")
    index = copied / "model_index.json"
    index.write_text(index.read_text().replace("Flux2KleinPipeline", "Flux2Pipeline"))
    other = text_fingerprint(find_model(str(copied)), "cpu")
    assert other != before, "another pipeline writes other words around a prompt"
    weights = max((copied / "text_encoder").glob("*.safetensors"), key=lambda path: path.stat().st_size)
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.unlink()
    weights.write_bytes(content)
    assert text_fingerprint(find_model(str(copied)), "cpu") not in (before, other)


def test_modules_and_targets_that_are_not_there_are_named(make) -> None:
    with pytest.raises(UsageError, match=r"trainable.modules: x_embeder: no such module.*did you mean x_embedder"):
        finetune(make("a", "trainable.modules=[x_embeder]"))
    with pytest.raises(UsageError, match=r"trainable.targets: proj: no linear layer"):
        finetune(make("b", "trainable.targets=[proj]"))
    with pytest.raises(UsageError, match=r"optimizer.multipliers: proj: nothing of this module learns"):
        finetune(make("c", "optimizer.multipliers={proj: 2}"))


def test_dry_run_tells_what_learns_and_writes_nothing(make, cli, tmp_path: Path) -> None:
    recipe = make("dry")
    code, stdout, stderr = cli("finetune", tmp_path / "dry.yaml", "--dry-run")
    assert code == 0, stderr
    assert "proj_out" in stdout
    assert "4 x 64 = 256" in stdout
    assert "LoRA" in stdout
    # 24 images of 64 tokens of 32 numbers in half precision.
    assert "cached latents 98.3 kB" in " ".join(stdout.split())
    assert "the result" in stdout
    assert not recipe.output.exists()


def test_the_speed_of_a_gpu_that_is_not_here_is_assumed_and_called_so(
    make, cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make("dry")
    monkeypatch.setattr("liftkit.finetune.needs.MEASURED", 0)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, stdout, stderr = cli("finetune", tmp_path / "dry.yaml", "--dry-run")
    assert code == 0, stderr
    assert "not measured on this CPU" in " ".join(stdout.split())
    assert "on one GPU at an assumed 200 TFLOPS" in " ".join(stdout.split())


def test_a_dry_run_names_the_packages_that_are_missing(
    make, cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make("dry")
    monkeypatch.setitem(sys.modules, "lpips", None)
    monkeypatch.setattr("liftkit.finetune.run.available_trackers", list)
    monkeypatch.setattr("liftkit.finetune.quantize.find_spec", lambda name: None)
    wanted = ("trackers=[wandb]", "base.quantize=int8", "objective.perceptual=lpips")
    code, stdout, stderr = cli("finetune", tmp_path / "dry.yaml", "--dry-run", *wanted)
    assert code == 0, stderr
    shown = " ".join(stdout.split())
    assert "trackers: wandb: not installed; pip install wandb" in shown
    assert "base.quantize: int8: torchao is not installed; pip install torchao" in shown
    assert "lpips package is not installed" in shown


def test_a_result_is_pushed_only_when_asked_and_nothing_begins_that_could_not_be(
    make, cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake = FakeHub()
    monkeypatch.setattr(huggingface_hub, "HfApi", fake)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_token_of_a_test")
    recipe = make("pushed")
    quick = ("steps=1", "previews.every=0", "validation.every=0", "objective.adversarial=0", "save=adapter")
    command = ("finetune", tmp_path / "pushed.yaml", *quick)
    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub, "get_token", lambda: None)
        code, _, stderr = cli(*command, "--push", "org/name")
    assert (code, "no token" in stderr, recipe.output.exists()) == (2, True, False)
    code, _, stderr = cli(*command, "--public")
    assert (code, "give --push" in stderr, recipe.output.exists()) == (2, True, False)
    code, stdout, stderr = cli(*command, "--push", "org/name")
    assert code == 0, stderr
    assert "pushed to https://huggingface.co/org/name (private)" in stdout
    assert fake.private == {"org/name": True}
    assert {"README.md", "liftkit.json", "adapter.safetensors"} <= fake.calls[-1][2]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twelve demo images in a folder, two of them unreadable."""
    from PIL import Image

    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(12):
        Image.fromarray(demo.image_at(index)[0]).save(folder / f"{index:02d}.png")
    (folder / "03.png").write_bytes(b"no picture")
    (folder / "07.png").write_bytes((folder / "07.png").read_bytes()[:200])
    return folder


def test_images_left_out_are_counted_and_named_from_the_beginning_to_the_end(make, photos: Path) -> None:
    quick = ("steps=3", "batch_size=10", "previews.every=0", "validation.every=0", "objective.adversarial=0")
    recipe = make("skips", f"data.sources=[{{kind: folder, path: {photos}}}]", "data.workers=0", *quick)
    watch = Watch(lambda step: (photos / "05.png").unlink(missing_ok=True))
    done = finetune(recipe, observer=watch)
    before = "9 of 12 images used; left out: 1 text, not a picture (03.png); 1 truncated (07.png)"
    assert done.tallies[0].summary() == f"{before}; 1 gone (05.png)"
    assert before.replace("9", "10") in watch.notes
    assert watch.text.endswith("3 images left out")
    record = json.loads((recipe.output / "run.json").read_text())
    (tally,) = record["data"][0]["tallies"]
    assert (tally["what"], tally["found"], tally["used"], record["data"][0]["images"]) == ("images", 12, 10, 10)
    assert [each["examples"] for each in tally["left_out"]] == [["03.png"], ["07.png"]]
    (lost,) = [row for row in rows(recipe.output) if "left_out" in row]
    assert (lost["step"], [each["examples"] for each in lost["left_out"]]) == (2, [["05.png"]])
    assert "step 2: images that can no longer be used: 1 gone (05.png)" in watch.notes


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


class Recorder(torch.nn.Module):
    """Notes which attention torch may choose while it runs."""

    gradient_checkpointing = False

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        self.fused = torch.backends.cuda.flash_sdp_enabled()
        return hidden_states


@pytest.mark.parametrize(
    ("tokens", "autocast", "learns", "again", "fused"),
    [
        (16, True, True, False, False),
        (256, True, True, False, True),
        (16, False, True, False, True),
        (16, True, False, False, True),
        (16, True, True, True, True),
    ],
)
def test_few_tokens_are_attended_to_plainly_where_that_trains_faster(
    tokens: int, autocast: bool, learns: bool, again: bool, fused: bool
) -> None:
    model = Recorder()
    model.gradient_checkpointing = again
    network = Network(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.set_grad_enabled(learns):
        network(hidden_states=torch.zeros(1, tokens, 8))
    assert model.fused is fused
    assert torch.backends.cuda.flash_sdp_enabled()
