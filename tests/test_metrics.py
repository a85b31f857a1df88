"""Published figures: their estimators against closed forms, the networks, and ``liftkit compare --metrics``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from liftkit.errors import UsageError
from liftkit.evaluate import distances, inception, metrics
from liftkit.evaluate.distances import clip_discrepancy, kernel_distance
from liftkit.evaluate.eyes import EYES, INCEPTION, home, resized, resized_like_tensorflow
from liftkit.evaluate.figures import FIGURES
from liftkit.evaluate.inception import Inception, load_inception
from liftkit.evaluate.patches import Gaussian, frechet, gaussian

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty place for weights."""
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "assets"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    home().mkdir(parents=True)
    return home()


@pytest.fixture
def networks(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Small networks of random weights in the cache's place."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, Dinov2Config, Dinov2Model

    monkeypatch.setattr(inception, "STEM", 4)
    monkeypatch.setattr("liftkit.evaluate.eyes.SIDE", 75)
    save_file(_random(Inception()), place / INCEPTION)
    layers = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    for name in ("clip-vit-large-patch14", "clip-vit-large-patch14-336"):
        text = {**layers, "vocab_size": 514, "max_position_embeddings": 77, "projection_dim": 8}
        vision = {**layers, "image_size": 28, "patch_size": 14, "projection_dim": 8}
        text |= {"eos_token_id": 513, "bos_token_id": 512, "pad_token_id": 513}
        CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(place / name)
    _tokenizer(CLIPTokenizer).save_pretrained(place / "clip-vit-large-patch14")
    Dinov2Model(Dinov2Config(**{**layers, "image_size": 56, "patch_size": 14})).save_pretrained(place / "dinov2-large")
    return place


def _tokenizer(kind: type) -> object:
    """A tokenizer of single letters, by CLIP's class."""
    letters = [chr(code) for code in range(33, 127)]
    names = [*letters, *(f"{letter}</w>" for letter in letters)]
    names += [f"unused{index}" for index in range(512 - len(names))] + ["<|startoftext|>", "<|endoftext|>"]
    return kind(vocab={name: index for index, name in enumerate(names)}, merges=[])


def _random(network: torch.nn.Module) -> dict[str, Tensor]:
    """Weights with which activations stay alive through all layers."""
    state = network.state_dict()
    for name, tensor in state.items():
        if name.endswith(("running_mean", "bn.bias")):
            tensor.normal_(0, 0.1)
        elif name.endswith("running_var"):
            tensor.uniform_(0.05, 0.2)
    return {name: tensor.clone() for name, tensor in state.items() if not name.endswith("num_batches_tracked")}


def test_the_frechet_distance_of_normal_distributions_is_that_of_the_formula() -> None:
    """Diagonal covariances: sum of (m - n)^2 + (s - t)^2."""
    first = Gaussian(torch.tensor([0.0, 1.0, 2.0]).double(), torch.tensor([1.0, 4.0, 9.0]).double().diag())
    second = Gaussian(torch.tensor([1.0, 1.0, 0.0]).double(), torch.tensor([4.0, 4.0, 1.0]).double().diag())
    assert frechet(first, second) == pytest.approx(1 + 4 + 1 + 0 + 4)


def test_kid_of_two_points_is_that_of_the_formula() -> None:
    """Sets of two: off the diagonal there is one kernel value in each."""
    x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[2.0, 0.0], [0.0, 0.0]])
    within = 1.0 + 1.0
    across = ((2 / 2 + 1) ** 3 + 1 + 1 + 1) / 4
    assert kernel_distance(x, y) == pytest.approx(within - 2 * across)


def test_kid_is_unbiased_and_takes_subsets(monkeypatch: pytest.MonkeyPatch) -> None:
    same = [kernel_distance(*torch.randn(2, 30, 8)) for _ in range(20)]
    assert min(same) < 0 < max(same)
    x, y = torch.randn(60, 4), torch.randn(50, 4) + 1
    found = []
    for most in (0, 2**25):
        monkeypatch.setattr(distances, "MOST_PAIRS", most)
        monkeypatch.setattr(distances, "SUBSET", 20)
        found.append(kernel_distance(x, y))
    assert found[0] == pytest.approx(found[1]), "large sets are not multiplied whole"
    assert found[0] > 0.1


def test_cmmd_of_single_images_is_that_of_the_formula() -> None:
    x, y = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert clip_discrepancy(x, y) == pytest.approx(1000 * (2 - 2 * np.exp(-2 / 200)))
    assert clip_discrepancy(x, x) == pytest.approx(0, abs=1e-9)


def test_estimators_are_those_of_torchmetrics() -> None:
    pytest.importorskip("torchmetrics")
    from torchmetrics.image.fid import _compute_fid
    from torchmetrics.image.kid import poly_mmd

    x, y = torch.randn(64, 16).double(), torch.randn(64, 16).double() * 1.3 + 0.2
    a, b = gaussian(x), gaussian(y)
    expected = _compute_fid(a.mean, a.covariance, b.mean, b.covariance).item()
    assert frechet(a, b) == pytest.approx(expected, rel=1e-6)
    assert kernel_distance(x, y) == pytest.approx(poly_mmd(x, y).item(), rel=1e-6), "subsets of all are all"


def test_resizing_is_that_of_pil_in_floating_point() -> None:
    """As clean-fid takes it, channel by channel, both up and down."""
    for side in (40, 400):
        gray = np.random.default_rng(0).integers(0, 256, (side, side)).astype(np.float32)
        image = Image.fromarray(gray, mode="F").resize((299, 299), Image.Resampling.BICUBIC)
        expected = torch.from_numpy(np.asarray(image).clip(0, 255) / 127.5 - 1)
        found = resized(torch.from_numpy(gray / 127.5 - 1).expand(1, 3, -1, -1), 299)
        assert torch.allclose(found[0, 1], expected, atol=1e-4)


def test_resizing_of_tensorflow_begins_at_the_corner() -> None:
    """3 pixels to 6: places 0, 0.5, 1, ... of which the last repeats the border."""
    ramp = torch.tensor([0.0, 2.0, 4.0]).expand(1, 1, 3, 3)
    assert resized_like_tensorflow(ramp, 6)[0, 0, 0].tolist() == [0, 1, 2, 3, 4, 4]
    assert resized_like_tensorflow(ramp.mT, 6)[0, 0, :, 0].tolist() == [0, 1, 2, 3, 4, 4]


def test_inception_has_the_tensors_of_the_published_file() -> None:
    """Layers and shapes that a reader of pt_inception-2015-12-05 knows; 21.8 million numbers without the classifier."""
    state = {name: tuple(each.shape) for name, each in Inception().state_dict().items() if "num_batches" not in name}
    assert len(state) == 94 * 5
    assert sum(int(np.prod(shape)) for name, shape in state.items() if "running" not in name) == 21_785_568
    assert state["Mixed_6c.branch7x7dbl_4.conv.weight"] == (160, 160, 7, 1)
    assert state["Mixed_7b.branch3x3dbl_3a.conv.weight"] == (384, 384, 1, 3)
    assert state["Mixed_7c.branch_pool.conv.weight"] == (192, 2048, 1, 1)


@pytest.mark.slow
def test_inception_is_that_of_torch_fidelity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last bit, from the same weights and from 8-bit images, TensorFlow's resize included."""
    theirs = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3", exc_type=(ImportError, RuntimeError))
    state = _random(Inception())
    save_file(state, tmp_path / INCEPTION)
    whole = {**load_inception(tmp_path / INCEPTION).state_dict(), "fc.weight": torch.zeros(1008, 2048)}
    torch.save(whole | {"fc.bias": torch.zeros(1008)}, tmp_path / "theirs.pth")
    network = theirs.FeatureExtractorInceptionV3("", ["2048"], str(tmp_path / "theirs.pth"))
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        found = EYES["inception-tensorflow"].open(tmp_path / INCEPTION, "cpu")(images.float() / 127.5 - 1)
    assert torch.allclose(found, network(images)[0], rtol=1e-4)


def test_every_metric_has_a_row_and_a_network() -> None:
    assert set(metrics.METRICS) <= set(FIGURES)
    assert {metric.eye for metric in metrics.METRICS.values()} == set(EYES)


def test_metrics_through_the_command(
    networks: Path, cli: Cli, pixel_klein: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Every network sees every row; those that need more samples say so, and a page explains all."""
    monkeypatch.setattr("liftkit.evaluate.real.REFERENCE", 16)
    monkeypatch.setattr("liftkit.evaluate.figures.two_sample_accuracy", lambda *given, **choices: 0.5)
    monkeypatch.setattr("liftkit.evaluate.compare.TRIAL_STEPS", 0)
    arguments = (
        "compare", "demo", pixel_klein, "--quick", "-n", 8, "--steps", 1,
        "--metrics", "kid, clip,fid,cmmd,kid", "--json", tmp_path / "c.json", "--html", tmp_path / "c.html",
        "--cache", tmp_path / "cache",
    )  # fmt: skip
    code, out, err = cli(*arguments)
    assert code == 0, err
    found = json.loads((tmp_path / "c.json").read_text())
    rows = {row["key"]: row["figures"] for row in found["rows"] if row["figures"]}
    for name in ("kid", "clip", "cmmd"):
        assert all(isinstance(figures[name], float) for figures in rows.values())
        assert found["metrics"][name]["images"] == 8
        assert f"{name}: {found['metrics'][name]['definition']}" in " ".join(out.split())
    assert rows["real"]["kid"] != rows["pixel-1"]["kid"]
    assert all(figures["fid"] is None for figures in rows.values())
    assert "512 are needed" in found["metrics"]["fid"]["left_out"]
    assert "512 are needed" in " ".join(err.split())
    assert not set(found["verdicts"][0]["standings"]) & set(metrics.METRICS)
    page = (tmp_path / "c.html").read_text()
    assert "unbiased squared MMD" in page
    (networks / "clip-vit-large-patch14" / "model.safetensors").unlink()
    code, out, err = cli(*(each for each in arguments if each not in ("--html", tmp_path / "c.html")))
    assert code == 0, err
    assert "clip: left out" in err
    assert json.loads((tmp_path / "c.json").read_text())["rows"][0]["figures"]["kid"] == rows["real"]["kid"]


def test_each_metric_is_what_its_estimator_says(networks: Path, tmp_path: Path) -> None:
    """FID and FD-DINOv2 of equal sets are 0, a CLIP score is the cosine, and values that were kept are taken."""
    images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    names = ("fid", "fid-tf", "fd-dinov2", "clip")
    chosen = metrics.choose(names, 512)
    assert not chosen.missing
    assert metrics.choose(("kid",), 1).missing == {"kid": "kid: left out: 1 samples, 2 are needed"}

    from liftkit.progress import Silent

    prompts = [f"picture {index}" for index in range(6)]
    other = images.flip(0) // 2
    found = metrics.measure(chosen, {"same": images, "other": other}, images, prompts, tmp_path, "cpu", Silent())
    for name in names[:3]:
        assert found["same"][name] == pytest.approx(0, abs=1e-3)
        assert found["other"][name] > 1e-3
    assert -100 <= found["same"]["clip"] <= 100
    assert found["other"]["fid"] != found["other"]["fid-tf"]
    assert len(list(tmp_path.glob("*.json"))) == 8
    again = metrics.measure(chosen, {"same": images, "other": other}, images, prompts, tmp_path, "cpu", Silent())
    assert again == found


def test_metrics_without_weights_say_where_they_belong(place: Path) -> None:
    chosen = metrics.choose(("fid", "fd-dinov2"), 512)
    assert not chosen.weights
    assert str(place / INCEPTION) in chosen.missing["fid"]
    assert "docs/compare.md" in chosen.missing["fid"]
    assert "hf download facebook/dinov2-large" in chosen.missing["fd-dinov2"]


@pytest.mark.parametrize(
    ("word", "hint"), [("fidd", "did you mean fid?"), ("CLIP", "did you mean clip?"), ("x", "fd-dinov2")]
)
def test_unknown_metrics_name_the_nearest(word: str, hint: str) -> None:
    with pytest.raises(UsageError, match="--metrics") as caught:
        metrics.choose((word,), 512)
    assert hint in str(caught.value)


def test_weights_of_another_network_are_refused_before_work(networks: Path) -> None:
    state = load_file(networks / INCEPTION)
    del state["Mixed_6b.branch_pool.bn.running_var"]
    save_file(state, networks / INCEPTION)
    with pytest.raises(UsageError, match=r"Mixed_6b.branch_pool.bn.running_var is missing"):
        metrics.choose(("fid",), 512)
    torch.save(state, networks / INCEPTION)
    with pytest.raises(UsageError, match="safetensors"):
        metrics.choose(("kid",), 512)


def test_weights_in_the_cache_of_the_hub_are_found(place: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--facebook--dinov2-large" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("a" * 40)
    (snapshot / "config.json").write_text("{}")
    assert EYES["dinov2"].find() is None, "without weights"
    save_file({"x": torch.zeros(1)}, snapshot / "model.safetensors")
    assert EYES["dinov2"].find() == snapshot
