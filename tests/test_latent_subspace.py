"""Low rank on latents: a subspace of a VAE's latents is fitted, begun, trained and sampled, or refused where it does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from liftkit.conversion.execute import convert
from liftkit.conversion.networks import Shape
from liftkit.conversion.scratch import begin, network
from liftkit.data import demo
from liftkit.embedded import TINY_KLEIN
from liftkit.errors import UsageError
from liftkit.evaluate.entries import open_entry, open_pixel
from liftkit.finetune.recipe_file import load_recipe
from liftkit.finetune.result import plain_recipe
from liftkit.finetune.run import finetune
from liftkit.fit.job import FitJob, prepare, run
from liftkit.lift import Lift
from liftkit.models.flow import FlowModel
from liftkit.models.jit import JiTTransformer2DModel
from liftkit.models.latents import LatentSpace
from liftkit.models.load import load_vae
from liftkit.models.registry import architecture
from liftkit.options import FitOptions, InitOptions
from liftkit.progress import Silent
from liftkit.tokens import patchify

IMAGES = 16


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A subspace of tiny-klein's latents."""
    path = tmp_path_factory.mktemp("fitted") / "lift.safetensors"
    options = FitOptions(
        images="demo", num_images=IMAGES, kind="pca", rank=6, space="latent", color="srgb", device="cpu"
    )
    run(prepare(FitJob(("demo",), options, path)), Silent())
    return path


@pytest.fixture(scope="module")
def begun(fitted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained JiT on those latents."""
    folder = tmp_path_factory.mktemp("begun") / "jit"
    begin(folder, _options(subspace=fitted))
    return folder


def _options(**changes: Any) -> InitOptions:
    return InitOptions(**{"size": "tiny", "classes": "demo", "vae": "demo", "rank": 6, "resolution": 64, **changes})


def test_the_subspace_is_the_principal_one_of_latent_tokens(fitted: Path) -> None:
    lift = Lift.load(fitted)
    assert (lift.space, lift.patch_size, lift.channels, lift.rank, lift.scale) == ("latent", 2, 8, 6, 1.0)
    images = torch.from_numpy(demo.images(IMAGES)[0]).permute(0, 3, 1, 2).float() / 127.5 - 1.0
    tokens = patchify(LatentSpace(load_vae(TINY_KLEIN)).encode(images).double(), 2).reshape(-1, lift.dim)
    captured = (tokens @ lift.basis.double()).square().sum() / tokens.square().sum()
    best = torch.linalg.eigvalsh(tokens.T @ tokens)[-6:].sum() / tokens.square().sum()
    assert captured == pytest.approx(best.item(), abs=1e-3)
    assert lift.figures["energy_captured"] == pytest.approx(best.item(), abs=1e-3)


@pytest.mark.parametrize("rank", [0, 5, 32])
def test_the_velocity_on_latents_is_recovered_at_any_rank(rank: int) -> None:
    config = {"sample_size": 8, "patch_size": 2, "in_channels": 8, "num_layers": 1, "num_attention_heads": 2}
    config |= {"attention_head_dim": 8, "bottleneck_dim": 16, "num_classes": 3, "context_tokens": 0}
    full = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    lift = Lift(full[:, :rank], 1.0, 2, 1, space="latent")
    twin = network(architecture("JiTTransformer2DModel"), config, lift, 0).double()
    stock = JiTTransformer2DModel(**config).double().eval()
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        twin.load_state_dict({**stock.state_dict(), "lift.basis": lift.basis})
        flow, label = FlowModel(twin), torch.tensor([0, 2])
        assert (flow.is_pixel, flow.channels, flow.token_side) == (False, 8, 2)
        x = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        sigma = torch.tensor([0.3, 0.8], dtype=torch.float64)
        answer, found = stock(x, sigma, label).sample, flow.velocity(x, sigma, class_labels=label)
    level = sigma.view(-1, 1, 1)
    tokens, state = patchify(answer, 2), patchify(x, 2)
    inside = tokens @ lift.basis @ lift.basis.T
    beyond = (state + tokens) / level
    expected = inside + beyond - beyond @ lift.basis @ lift.basis.T
    assert torch.allclose(patchify(found, 2), expected, atol=1e-10)
    if rank == 0:  # u_A = -x_0
        assert torch.allclose(found, (x + answer) / sigma.view(-1, 1, 1, 1), atol=1e-10)
    if rank == 32:  # plain velocity
        assert torch.allclose(found, answer, atol=1e-10)


@pytest.mark.parametrize("kind", ["dit", "flux2"])
def test_other_networks_take_latents(kind: Any, tmp_path: Path) -> None:
    done = begin(tmp_path / kind, _options(architecture=kind, images="demo", num_images=4))
    assert (done.lift.space, done.lift.rank, done.lift.dim) == ("latent", 6, 32)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / kind)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(class_labels=[3], num_inference_steps=1, output_type="pt").images
    assert images.shape == (1, 3, 64, 64)
    assert images.isfinite().all()


def test_from_the_command_line_to_a_picture(tmp_path: Path, cli: Any) -> None:
    lift, model, recipe = tmp_path / "lift.safetensors", tmp_path / "model", tmp_path / "recipe.yaml"
    fit = ["fit", "demo", "--kind", "pca", "--rank", "6", "--space", "latent", "--images", "demo", "--num-images", "4"]
    assert cli(*fit, "-o", str(lift))[0] == 0
    made = ["init", "--size", "tiny", "--classes", "demo", "--vae", "demo", "--subspace", str(lift), "--rank", "4"]
    assert cli(*made, "-o", str(model))[0] == 0
    recipe.write_text(
        f"model: {model}\nspace: latent\noutput: {tmp_path / 'run'}\nsteps: 2\nbatch_size: 2\nprecision: no\n"
        "data: {sources: [{kind: demo, count: 4}]}\ntrainable: {mode: full}\nobjective: {loss: flow}\n"
        "previews: {every: 2, count: 1, steps: 1}\nvalidation: {every: 0}\ncheckpoints: {every: 0}\n"
    )
    code, _, err = cli("finetune", str(recipe))
    assert code == 0
    assert "previews are of pixel models alone" in err
    trained = DiffusionPipeline.from_pretrained(tmp_path / "run" / "model").transformer
    assert (trained.config.lift_space, trained.config.lift_rank) == ("latent", 4)
    assert trained.proj_out.weight.any()
    drawn = ["sample", str(tmp_path / "run" / "model"), "-p", "a seven", "--steps", "2", "-o", str(tmp_path / "x.png")]
    assert cli(*drawn, "--solver", "heun", "--sigma-floor", "0.04")[0] == 0
    assert cli(*drawn, "--overwrite", "--clamp")[0] == 2  # latents have no colors
    assert (tmp_path / "x.png").is_file()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vae": None}, "a subspace of latents; name their VAE by --vae"),
        ({"patch": 4}, "of patches of 2 latents of 8 channels, the network's tokens have 4 of 8"),
        ({"vae": "taef2"}, "of patches of 2 latents of 8 channels, the network's tokens have 2 of 32"),
        ({"rank": 7}, "holds 6 directions"),
        ({"rank": 33}, "a token of 2 x 2 latents has 32 numbers"),
        ({"resolution": 60}, "not a multiple of the 8 pixels of one token"),
        ({"vae": "nowhere"}, "no VAE"),
        ({"vae": "~nobody-of-this-name/vae"}, "no VAE"),
    ],
)
def test_what_does_not_fit_is_refused(fitted: Path, tmp_path: Path, changes: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        begin(tmp_path / "model", _options(subspace=fitted, **changes))
    assert not any(tmp_path.iterdir())


def test_a_subspace_of_pixels_makes_no_model_of_latents(tmp_path: Path) -> None:
    Lift(torch.eye(12, 6), 1.0, 2, 1).save(tmp_path / "pixels.safetensors")
    with pytest.raises(UsageError, match="a subspace of pixels, and --vae demo makes a model of latents"):
        begin(tmp_path / "model", _options(subspace=tmp_path / "pixels.safetensors"))


def test_a_conversion_needs_a_subspace_of_pixels(fitted: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a subspace of latents, for a model from nothing"):
        convert("demo", tmp_path / "out", lift=fitted)


def test_a_recipe_names_the_space_of_its_model(begun: Path, tmp_path: Path) -> None:
    recipe = {"output": str(tmp_path / "run"), "objective": {"loss": "flow"}, "trainable": {"mode": "full"}}
    recipe |= {"data": {"sources": [{"kind": "demo", "count": 4}]}, "model": str(begun)}
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    with pytest.raises(UsageError, match="a model of latents; set space: latent"):
        finetune(load_recipe(str(path)))
    path.write_text(json.dumps({**recipe, "model": "new", "network": {"vae": "demo", "classes": "demo"}}))
    with pytest.raises(UsageError, match=r"network\.vae"):
        load_recipe(str(path))


def test_of_a_recipe_s_vae_the_name_alone_is_published(tmp_path: Path) -> None:
    recipe = {"output": str(tmp_path / "run"), "objective": {"loss": "flow"}, "trainable": {"mode": "full"}}
    recipe |= {"data": {"sources": [{"kind": "demo", "count": 4}]}, "model": "new", "space": "latent"}
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps({**recipe, "network": {"vae": str(tmp_path / "mine"), "classes": "demo"}}))
    plain = plain_recipe(load_recipe(str(path)))
    assert plain["network"]["vae"] == "mine"
    assert str(tmp_path) not in json.dumps(plain)


def test_a_comparison_takes_it_for_a_latent_model(begun: Path) -> None:
    assert open_entry(str(begun)).lift is None
    with pytest.raises(UsageError, match="a latent model"):
        open_pixel(str(begun))


def test_space_latent_is_for_subspaces_of_free_rank() -> None:
    with pytest.raises(UsageError, match="--space latent needs --rank"):
        prepare(FitJob(("demo",), FitOptions(images="demo", kind="pca", space="latent"), Path("x.safetensors")))
    options = FitOptions(images="demo", kind="pca", rank=40, space="latent")
    with pytest.raises(UsageError, match="latent tokens of this model have 32 numbers"):
        prepare(FitJob(("demo",), options, Path("x.safetensors")))


def test_a_lift_of_latents_says_so_and_is_free() -> None:
    with pytest.raises(ValueError, match="a subspace of latents is free"):
        Lift(torch.eye(32, 4), 2.0, 2, 1, space="latent")
    with pytest.raises(ValueError, match="the space is color, expected pixel or latent"):
        Lift(torch.eye(12, 4), 1.0, 2, 1, space="color")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="latent patch needs"):
        Lift(torch.eye(33, 4), 1.0, 2, 1, space="latent")
    assert Shape("tiny", 2, 64, 10, 8, 4).side == 16
