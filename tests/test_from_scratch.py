"""Models made from nothing: init, the pipeline of classes, training on class folders, the automatic rank."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import save_file

from liftkit.color import SRGB
from liftkit.conversion.audit import audit
from liftkit.conversion.scratch import begin, class_names
from liftkit.data import demo
from liftkit.data.images import adm_cropped
from liftkit.errors import UsageError
from liftkit.finetune.recipe_file import load_recipe
from liftkit.finetune.repa import load_encoder
from liftkit.finetune.run import finetune
from liftkit.fit.moments import TokenMoments
from liftkit.fit.pca import fit_pca
from liftkit.fit.rank import auto_rank
from liftkit.lift import Lift
from liftkit.models.classes import labels_of
from liftkit.models.flow import FlowModel
from liftkit.models.jit_names import write_original
from liftkit.models.scheduler import with_solver
from liftkit.options import InitOptions
from liftkit.tokens import patchify

DIGITS = dict(enumerate(demo.DIGITS))


def options(**changes: Any) -> InitOptions:
    """A network small enough for tests."""
    small = {"size": "tiny", "classes": "demo", "images": "demo", "num_images": 8, "resolution": 32}
    return InitOptions(**{**small, **changes})


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained JiT of rank 8."""
    folder = tmp_path_factory.mktemp("begun") / "jit"
    begin(folder, options())
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two class folders of four pictures each."""
    for number, name in enumerate(("cat", "great dane")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for index in range(4):
            pixels = np.full((40, 48, 3), 40 * number + 20 * index, np.uint8)
            pixels[:, :20] += 90
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{index}.png")
    return tmp_path / "photos"


@pytest.mark.parametrize("kind", ["jit", "dit", "prx", "flux2"])
def test_every_network_is_begun_loaded_and_sampled(kind: Any, tmp_path: Path) -> None:
    done = begin(tmp_path / kind, options(architecture=kind))
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / kind)
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline).__name__ == "AsymFlowClassPipeline"
    assert (done.lift.rank, done.lift.dim) == (8, 192)
    state = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = pipeline(["a red seven", "0"], latents=state, num_inference_steps=2, output_type="pt").images
    again = pipeline(class_labels=[7, 0], latents=state, num_inference_steps=2, output_type="pt").images
    assert found.shape == (2, 3, 32, 32)
    assert found.isfinite().all()
    assert torch.equal(found, again)
    stock = getattr(diffusers, type(pipeline.transformer).__name__.removeprefix("Asym"))
    with pytest.raises((ValueError, RuntimeError)):
        stock.from_pretrained(tmp_path / kind / "transformer")


def test_what_is_saved_again_is_the_same(begun: Path, tmp_path: Path) -> None:
    first = DiffusionPipeline.from_pretrained(begun)
    first.save_pretrained(tmp_path / "again")
    second = DiffusionPipeline.from_pretrained(tmp_path / "again")
    assert second.names == DIGITS
    tensors = first.transformer.state_dict()
    assert all(torch.equal(value, tensors[name]) for name, value in second.transformer.state_dict().items())


def test_the_subspace_is_the_principal_one_of_patches_and_their_mirror_images(begun: Path) -> None:
    lift = Lift.load(begun / "lift.safetensors")
    small = np.stack([np.asarray(Image.fromarray(image).resize((32, 32))) for image in demo.images(8)[0]])
    assert lift.color.to_dict() == SRGB().to_dict()
    # Whatever the images: the span of a mirrored basis is the same.
    mirror = torch.arange(192).reshape(3, 8, 8).flip(2).flatten()
    assert torch.linalg.svdvals(lift.basis.T @ lift.basis[mirror]).min() > 0.999
    tokens = patchify(torch.from_numpy(small).permute(0, 3, 1, 2).double() / 127.5 - 1.0, 8).reshape(-1, 192)
    captured = (tokens @ lift.basis.double()).square().sum() / tokens.square().sum()
    assert captured == pytest.approx(lift.figures["energy_captured"], abs=0.05)
    twin = DiffusionPipeline.from_pretrained(begun).transformer
    assert torch.equal(twin.lift.basis, lift.basis.float())
    gain = (2 * 192 / (192 + 64)) ** 0.5
    assert torch.allclose(twin.patch_embed.proj.weight[:8].flatten(1), gain * lift.basis.T.float(), atol=1e-6)


@pytest.mark.parametrize("rank", [0, 192])
def test_ranks_0_and_all_need_no_images(rank: int, tmp_path: Path) -> None:
    done = begin(tmp_path / "model", options(rank=rank, images=None))
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "model")
    assert pipeline.transformer.lift.basis.shape == (192, rank)
    assert Lift.load(tmp_path / "model" / "lift.safetensors").rank == done.lift.rank == rank


def test_a_given_subspace_may_hold_more_directions(begun: Path, tmp_path: Path) -> None:
    given = begun / "lift.safetensors"
    done = begin(tmp_path / "model", options(rank=3, images=None, subspace=given))
    assert torch.equal(done.lift.basis, Lift.load(given).basis[:, :3])


def test_the_automatic_rank_counts_directions_with_more_than_the_noise() -> None:
    values = torch.tensor([9.0, 1.01, 0.99, 0.1], dtype=torch.float64)
    q = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
    found = auto_rank(50 * q @ values.diag() @ q.T, 50)
    assert found.rank == 2
    assert found.spectrum == pytest.approx(values.tolist())
    assert "1.01" in found.reason
    assert auto_rank(torch.zeros(4, 4), 3).rank == 0


def test_init_chooses_the_rank_of_the_images(tmp_path: Path) -> None:
    done = begin(tmp_path / "model", options(rank="auto"))
    assert done.chosen is not None
    assert done.lift.rank == done.chosen.rank == sum(value > 1 for value in done.chosen.spectrum) > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": None}, "needs the leading directions of images"),
        ({"rank": 193}, "a token of 8 x 8 pixels has 192 numbers"),
        ({"rank": 65}, "does not fit into a bottleneck of 64"),
        ({"resolution": 30}, "not a multiple of the 8 pixels"),
        ({"classes": "nowhere"}, "no such file or folder"),
        ({"classes": "0"}, "expected 1 to"),
        ({"patch": 4, "subspace": "begun", "images": None}, "of patches of 8 pixels"),
        ({"rank": 9, "subspace": "begun", "images": None}, "holds 8 directions"),
        ({"color": "oklab", "subspace": "begun", "images": None}, "fitted in other colors"),
        ({"architecture": "flux2", "patch": 6, "resolution": 36}, "power of two"),
    ],
)
def test_choices_that_do_not_go_together(begun: Path, tmp_path: Path, changes: Any, message: str) -> None:
    if "subspace" in changes:
        changes = {**changes, "subspace": begun / "lift.safetensors"}
    with pytest.raises(UsageError, match=message):
        begin(tmp_path / "model", options(**changes))
    assert not any(tmp_path.iterdir())


def test_names_of_classes(photos: Path, tmp_path: Path) -> None:
    assert class_names(str(photos)) == ["cat", "great dane"]
    (tmp_path / "names.txt").write_text("tench, Tinca tinca\n\ngoldfish\n")
    assert class_names(str(tmp_path / "names.txt")) == ["tench, Tinca tinca", "goldfish"]
    (tmp_path / "twice.txt").write_text("tench\nTench\n")
    with pytest.raises(UsageError, match="there twice"):
        class_names(str(tmp_path / "twice.txt"))


def test_what_a_text_means() -> None:
    names = {0: "tench, Tinca tinca", 1: "goldfish", 2: "great dane"}
    assert labels_of(["Tinca Tinca", "tench, Tinca tinca", "1", "", "my Great-Dane sleeps"], names) == [0, 0, 1, 3, 2]
    with pytest.raises(UsageError, match="none of the model's classes"):
        labels_of(["a danegeld"], names)
    with pytest.raises(UsageError, match="means 2 classes"):
        labels_of(["goldfish beside a tench"], names)


def test_class_folders_train_flipped_and_resume(photos: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        json.dumps(
            {
                "model": "new",
                "output": str(tmp_path / "run"),
                "network": {"size": "tiny", "classes": str(photos), "resolution": 32, "rank": 0},
                "data": {
                    "sources": [{"kind": "folder", "path": str(photos), "captions": "folders"}],
                    "flip": 0.5,
                    "crop": "adm",
                },
                "steps": 3,
                "batch_size": 2,
                "precision": "no",
                "trainable": {"mode": "full"},
                "objective": {"loss": "flow"},
                "noise": {"mean": 0.8, "std": 0.8, "shift": 1.0},
                "ema": {"kind": "constant", "decay": 0.9, "start": 0},
                "checkpoints": {"every": 2},
                "previews": {"every": 3, "count": 2, "steps": 2},
            }
        )
    )
    done = finetune(load_recipe(str(recipe)))
    assert done.result is not None
    first = {name: value.clone() for name, value in done.trainer.learner.average.values.items()}  # type: ignore[union-attr]
    assert {name.partition("/")[0] for name in map(done.trainer.data.sources[0].label, range(8))} == {
        "cat",
        "great dane",
    }
    assert done.trainer.data.prompts(["great dane", ""])["class_labels"].tolist() == [1, 2]
    again = finetune(load_recipe(str(recipe)), resume=str(tmp_path / "run" / "checkpoints" / "step-0000002"))
    after = again.trainer.learner.average.values  # type: ignore[union-attr]
    assert all(torch.equal(value, after[name]) for name, value in first.items())
    pipeline = DiffusionPipeline.from_pretrained(again.result)
    assert pipeline.names == {0: "cat", 1: "great dane"}
    stored = pipeline.transformer.state_dict()
    assert torch.equal(stored["proj_out.weight"], after["proj_out.weight"])
    assert stored["proj_out.weight"].any()


def test_repa_draws_tokens_toward_dinov2(tmp_path: Path) -> None:
    from transformers import Dinov2Config, Dinov2Model

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 7}
    encoder = Dinov2Model(Dinov2Config(**sizes))
    encoder.save_pretrained(tmp_path / "dino")
    given = {
        "model": "new",
        "output": str(tmp_path / "run"),
        "network": {"size": "tiny", "classes": "demo", "resolution": 32, "rank": 0},
        "data": {"sources": [{"kind": "demo", "count": 8}]},
        "steps": 12,
        "batch_size": 4,
        "precision": "no",
        "gradient_checkpointing": True,
        "trainable": {"mode": "full"},
        "objective": {"loss": "flow", "repa": 5.0, "repa_block": 3, "repa_encoder": str(tmp_path / "dino")},
        "optimizer": {"learning_rate": 1e-3, "warmup": 0},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(given))
    done = finetune(load_recipe(str(tmp_path / "recipe.yaml")))
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    terms = [row["repa"] for row in rows if "repa" in row]
    assert terms[-1] < terms[0] <= 2.0
    assert done.result is not None
    assert not any("repa" in name for name in DiffusionPipeline.from_pretrained(done.result).transformer.state_dict())
    repa = done.trainer.learner.objective.repa
    images = torch.rand(1, 3, 32, 32) * 2.0 - 1.0
    assert repa.features(images, 4, 4).shape == (1, 16, 16)
    with pytest.raises(UsageError, match=r"repa_encoder: .*nowhere: its weights are not here"):
        load_encoder(str(tmp_path / "nowhere"))


def test_pictures_outside_of_class_folders_are_named(photos: Path) -> None:
    from liftkit.data.captioned import CaptionedFolder

    Image.new("RGB", (40, 40)).save(photos / "loose.png")
    with pytest.raises(UsageError, match=r"loose\.png, are in no folder"):
        CaptionedFolder(photos, by_folder=True)


def test_adm_halves_by_boxes_then_is_bicubic() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (100, 140, 3), np.uint8)
    halved = Image.fromarray(pixels).resize((70, 50), Image.Resampling.BOX)
    wanted = np.asarray(halved.resize((45, 32), Image.Resampling.BICUBIC))[:, 6:38]
    assert np.array_equal(adm_cropped(Image.fromarray(pixels), 32, 32).permute(1, 2, 0).numpy(), wanted)


def _pipeline(begun: Path) -> Any:
    """The untrained model, made to answer something."""
    pipeline = DiffusionPipeline.from_pretrained(begun)
    pipeline.set_progress_bar_config(disable=True)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in pipeline.transformer.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return pipeline


def test_heun_takes_two_evaluations_a_step_but_for_the_last(begun: Path) -> None:
    pipeline, calls = _pipeline(begun), []
    pipeline.scheduler = with_solver(pipeline.scheduler, "heun")
    pipeline.transformer.register_forward_hook(lambda *_: calls.append(1))
    state = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    made = pipeline(class_labels=3, latents=state, num_inference_steps=5, output_type="latent").images
    assert len(calls) == 2 * 5 - 1
    assert made.isfinite().all()
    # The grid of the paper: even from 1, and 0 at the end.
    assert sorted(set(pipeline.scheduler.sigmas.tolist())) == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])


def test_guidance_is_within_its_interval(begun: Path) -> None:
    pipeline = _pipeline(begun)
    state = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def made(**more: Any) -> torch.Tensor:
        found: torch.Tensor = pipeline(
            "seven", latents=state, num_inference_steps=4, output_type="latent", **more
        ).images
        return found

    plain = made(guidance_scale=1.0)
    assert torch.allclose(made(guidance_scale=3.0, guidance_interval=(0.9, 0.95)), plain, atol=1e-5)
    low, full = (
        made(guidance_scale=3.0, guidance_interval=(0.0, 0.3)),
        made(guidance_scale=3.0, guidance_interval=(0.0, 1.0)),
    )
    assert not torch.allclose(low, plain, atol=1e-3)
    assert not torch.allclose(low, full, atol=1e-3)
    # The last step alone, at 0.25.
    u, free = ({"class_labels": torch.tensor([label])} for label in (7, 10))
    flow, sigma = FlowModel(pipeline.transformer), torch.tensor([0.25])
    before = made(guidance_scale=1.0, callback_on_step_end=_stop_before_last)
    with torch.no_grad():
        c, f = flow.velocity(before, sigma, **u), flow.velocity(before, sigma, **free)
    assert torch.allclose(low, before - 0.25 * (f + 3.0 * (c - f)), atol=1e-4)


def _stop_before_last(pipeline: Any, step: int, time: Any, values: dict[str, Any]) -> dict[str, Any]:
    if step == 2:
        pipeline.kept = values["latents"]
    return {"latents": pipeline.kept} if step == 3 else {}


def test_a_begun_model_is_verified(begun: Path, tmp_path: Path) -> None:
    assert audit(begun).ok
    shutil.copytree(begun, tmp_path / "changed")
    lift = Lift.load(begun / "lift.safetensors")
    Lift(lift.basis.flip(1), 1.0, 8, 1, lift.color).save(tmp_path / "changed" / "lift.safetensors")
    found = {check.name: check for check in audit(tmp_path / "changed").checks}
    assert not found["manifest"].ok
    assert found["lift"].problems == ["transformer: lift.basis is not that of lift.safetensors"]


@pytest.mark.parametrize("rank", [0, 8])
def test_weights_of_the_authors_become_a_folder(begun: Path, rank: int, tmp_path: Path) -> None:
    pipeline = _pipeline(begun)
    twin, lift = pipeline.transformer, Lift.load(begun / "lift.safetensors")
    theirs = write_original(twin.config, twin.state_dict(), lift.basis.float() if rank else None)
    save_file({name: value.contiguous() for name, value in theirs.items()}, tmp_path / "theirs.safetensors")
    done = begin(tmp_path / "model", options(weights=tmp_path / "theirs.safetensors", images=None))
    assert done.lift.rank == rank
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "model").transformer
    assert loaded.config.predicts_data is (rank == 0)
    state = loaded.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in twin.state_dict().items() if name != "lift.basis")
    with pytest.raises(UsageError, match="of 10 classes, --classes names 3"):
        begin(tmp_path / "other", options(weights=tmp_path / "theirs.safetensors", classes="3"))


def test_pca_takes_the_automatic_rank() -> None:
    generator = torch.Generator().manual_seed(0)
    moments = TokenMoments(1, 12)
    tokens = torch.randn(40, 50, 12, generator=generator, dtype=torch.float64) * torch.tensor([3.0, 2.0] + [0.3] * 10)
    moments.update(tokens[..., :1], tokens)
    assert fit_pca(moments, rank="auto", color=SRGB()).rank == 2


def test_the_sweep_over_ranks_runs(tmp_path: Path) -> None:
    path = Path(__file__).parents[1] / "benchmarks" / "ranks.py"
    spec = importlib.util.spec_from_file_location("ranks", path)
    assert spec is not None
    assert spec.loader is not None
    ranks = importlib.util.module_from_spec(spec)
    sys.modules["ranks"] = ranks
    spec.loader.exec_module(ranks)
    ranks.draw_data(tmp_path / "ranks.npz", 16, 12)
    small = {"steps": 1, "batch": 2, "depth": 1, "width": 64, "samples": 12, "sampler_steps": 1, "held_out": 12}
    small |= {"side": 32, "noise_mean": 0.8, "noise_std": 0.8, "embeddings": 2.0}
    plan = ranks.Plan(
        data=str(tmp_path / "ranks.npz"), device="cpu", rate=1e-3, threads=1, guidance=(2.0,), graphs=False, **small
    )
    ranks.work(plan, [(0, 0), (4, 0)], tmp_path, float("inf"))
    runs = [json.loads((tmp_path / f"rank-{rank}-seed-0.json").read_text()) for rank in (0, 4)]
    lines = ranks.table({"runs": runs}).splitlines()
    assert lines[0] == "| | r = 0 | r = 4 |"
    assert len(lines) == 2 + 1 + 6 + 4
