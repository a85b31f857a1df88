"""Training runs: what they begin with, what they leave, and what is named before they begin."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import constants
from safetensors.torch import load_file

from liftkit.checkpoint.model import find_model
from liftkit.embedded import TINY_KLEIN
from liftkit.errors import UsageError
from liftkit.finetune.encoders import text_fingerprint
from liftkit.finetune.network import Network, connect
from liftkit.finetune.run import finetune
from liftkit.finetune.trainee import open_trainee
from liftkit.models.adapted import load_pixel_pipeline
from liftkit.models.adapter import Adapter
from tests.test_hub import FakeHub
from tests.training import Watch, rows


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
    code, stdout, stderr = cli("finetune", tmp_path / "dry.yaml", "--dry-run", "--json", *wanted)
    assert code == 0, stderr
    shown = json.loads(stdout)["estimate"]["Missing"]["before it can run"]
    assert "trackers: wandb: not installed; pip install wandb" in shown
    assert "base.quantize: int8: torchao is not installed; pip install torchao" in shown
    assert "lpips package is not installed" in shown


def test_a_dry_run_looks_through_the_vae_without_its_weights(
    make, cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make("dry")
    monkeypatch.setattr("liftkit.finetune.needs.MEASURED", 0)
    code, stdout, stderr = cli("finetune", tmp_path / "dry.yaml", "--dry-run", "--json", "objective.perceptual=vae")
    assert code == 0, stderr
    assert "activations" in json.loads(stdout)["estimate"]["What it takes"]["peak memory"]


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
