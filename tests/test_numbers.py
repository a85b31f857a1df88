"""Numbers that are none stop a command, with the component that they come from; ends of ranges are defined."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from liftkit.asymflow import calibrate, lift_sigma, recover_velocity
from liftkit.checkpoint.finite import check_files, first_not_finite
from liftkit.checkpoint.header import read_header
from liftkit.checkpoint.model import find_model
from liftkit.checkpoint.text import check_prompts
from liftkit.cli.app import run
from liftkit.conversion.plan import make_plan
from liftkit.embedded import TINY_KLEIN
from liftkit.errors import LiftkitError, UsageError
from liftkit.finetune.recipe_file import load_recipe
from liftkit.finetune.run import finetune
from liftkit.fit.moments import TokenMoments
from liftkit.models.load import load_component
from liftkit.options import ConvertOptions
from liftkit.progress import Silent

STEM = "diffusion_pytorch_model.safetensors"
PLACES = {
    "vae": (f"vae/{STEM}", "decoder.conv_out.weight"),
    "text_encoder": ("text_encoder/model.safetensors", "model.embed_tokens.weight"),
    "transformer": (f"transformer/{STEM}", "proj_out.weight"),
}


def spoiled(tmp_path: Path, component: str, value: float, tensor: str | None = None, source: Path = TINY_KLEIN) -> Path:
    model = tmp_path / "model"
    shutil.copytree(source, model)
    name, known = PLACES[component]
    name = f"latent/{name}" if (model / "latent" / name).is_file() else name
    tensor = tensor or known
    tensors = load_file(model / name)
    changed = tensors[tensor].clone()
    changed.view(-1)[:: max(1, changed.numel() // 1000)] = value
    save_file({**tensors, tensor: changed}, model / name, {"format": "pt"})
    return model


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("component", PLACES)
def test_every_weight_file_is_looked_at_in_the_plan(component: str, value: float, tmp_path: Path) -> None:
    model = spoiled(tmp_path, component, value)
    with pytest.raises(
        UsageError, match=f"{component}/.*{PLACES[component][1]}' holds NaN or infinite|NaN or infinite"
    ):
        make_plan(str(model), tmp_path / "out", ConvertOptions(images="demo", device="cpu"))


@pytest.mark.parametrize(
    ("component", "value"), [("vae", float("nan")), ("text_encoder", float("nan")), ("transformer", float("inf"))]
)
def test_sample_names_the_component(
    component: str, value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, picture = spoiled(tmp_path, component, value), tmp_path / "s.png"
    arguments = ["sample", str(model), "-p", "a red seven", "-n", "1", "--steps", "2", "-o", str(picture)]
    monkeypatch.setattr(sys, "argv", ["liftkit", *arguments, "--device", "cpu"])
    with pytest.raises(SystemExit) as found:
        run()
    said = capsys.readouterr().err
    assert found.value.code == 2
    assert f"error: {component}: " in said
    assert PLACES[component][1] in said
    assert not picture.exists()


ENCODER = "encoder.conv_in.weight"
FINETUNE = ["steps=1", "batch_size=1", "precision=no", "data.sources=[{kind: demo, count: 2}]", "validation.every=0"]
COMMANDS: list[tuple[str, str | None, list[Any]]] = [
    ("vae", ENCODER, ["fit", "MODEL", "--images", "demo", "--num-images", 16, "-o", "OUT/lift.safetensors"]),
    *(
        (name, None, ["generate", "MODEL", "--prompts", "demo", "-n", 1, "--steps", 1, "-o", "OUT/made"])
        for name in PLACES
    ),
    *(
        (name, None, ["compare", "MODEL", "PIXEL", "--quick", "-n", 8, "--steps", 1, "--html", "OUT/a.html"])
        for name in ("text_encoder", "transformer")
    ),
    ("vae", ENCODER, ["finetune", "tiny-klein", "model=MODEL", *FINETUNE, "previews.every=0", "-o", "OUT/run"]),
    ("text_encoder", None, ["finetune", "tiny-klein", "model=MODEL", *FINETUNE, "previews.every=0", "-o", "OUT/run"]),
]


@pytest.mark.parametrize(("component", "tensor", "command"), COMMANDS, ids=lambda value: str(value)[:40])
def test_every_command_names_the_component(
    component: str, tensor: str | None, command: list[Any], pixel_klein: Path, tmp_path: Path, cli: Any
) -> None:
    source = pixel_klein if command[0] == "finetune" else TINY_KLEIN
    model = spoiled(tmp_path, component, float("nan"), tensor, source)
    where = {"MODEL": model, "OUT": tmp_path / "out", "PIXEL": pixel_klein}
    (tmp_path / "out").mkdir()
    words = [str(word) for word in command]
    for key, value in where.items():
        words = [word.replace(key, str(value)) for word in words]
    code, _, err = cli(*words)
    line = next(line for line in err.splitlines() if line.startswith("error"))
    assert code in (1, 2), err
    assert f"{component}: " in line, line
    assert tensor or PLACES[component][1] in line, line
    assert "fault of liftkit" not in err
    assert not list((tmp_path / "out").rglob("*.png"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_the_first_tensor_that_is_not_finite_is_found(dtype: torch.dtype, value: float, tmp_path: Path) -> None:
    tensors = {
        "a": torch.ones(300_000, dtype=dtype),
        "b": torch.zeros(5, dtype=dtype),
        "empty": torch.zeros(0, dtype=dtype),
    }
    save_file({**tensors, "whole": torch.arange(9)}, tmp_path / "w.safetensors")
    assert first_not_finite(read_header(tmp_path / "w.safetensors")) is None
    tensors["b"][4] = value
    save_file(tensors, tmp_path / "w.safetensors")
    header = read_header(tmp_path / "w.safetensors")
    assert first_not_finite(header) == "b"
    with pytest.raises(UsageError, match="'b' holds NaN"):
        check_files([header])
    check_files([header], budget=8)


@pytest.mark.parametrize("scale", [1e-3, 0.5, 1.0, 3.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_both_ends_of_the_noise_are_defined(scale: float, dtype: torch.dtype) -> None:
    sigma = torch.tensor([0.0, 1.0], dtype=dtype)
    gain, tau = calibrate(sigma, scale)
    assert torch.allclose(gain, torch.tensor([1 / scale, 1.0], dtype=gain.dtype))
    assert tau.tolist() == pytest.approx([0.0, 1.0], rel=1e-4)
    assert lift_sigma(sigma, scale).tolist() == pytest.approx([0.0, 1.0], rel=1e-4)
    basis = torch.linalg.qr(torch.randn(12, 4, generator=torch.Generator().manual_seed(0)))[0]
    x = torch.randn(2, 1, 12, generator=torch.Generator().manual_seed(1))
    basis, x = basis.to(gain.dtype), x.to(gain.dtype)
    # One token, no noise and nothing but noise.
    found = recover_velocity(-x / scale, x, sigma, basis, scale)
    assert found.isfinite().all()
    assert torch.allclose(
        found[0],
        recover_velocity(-x[:1] / scale, x[:1], torch.tensor([1e-9], dtype=gain.dtype), basis, scale)[0],
        atol=1e-2,
    )
    assert recover_velocity(x[:0], x[:0], sigma[:0], basis, scale).shape == (0, 1, 12)
    assert recover_velocity(x[:, :0], x[:, :0], sigma, basis, scale).shape == (2, 0, 12)


def test_an_empty_batch_adds_nothing() -> None:
    moments = TokenMoments(4, 12)
    moments.update(torch.zeros(0, 3, 4), torch.zeros(0, 3, 12))
    moments.update(torch.zeros(2, 0, 4), torch.zeros(2, 0, 12))
    assert moments.count == 0
    assert moments.images == 0
    assert not moments.cross.any()
    moments.update(torch.ones(1, 1, 4), torch.ones(1, 1, 12))
    assert moments.count == 1
    with pytest.raises(ValueError, match="NaN or infinity"):
        moments.update(torch.full((1, 1, 4), float("nan")), torch.ones(1, 1, 12))
    assert moments.count == 1


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("shift", float("nan")), ("shift", float("inf")), ("shift", 0), ("shift", "3"), ("shift", True),
        ("num_train_timesteps", 0), ("num_train_timesteps", 10**12), ("base_shift", 1e308), ("lift_scale", -1.0),
    ],
)  # fmt: skip
def test_numbers_of_a_schedule_are_in_their_ranges(key: str, value: Any, tmp_path: Path) -> None:
    shutil.copytree(TINY_KLEIN, tmp_path / "model")
    path = tmp_path / "model" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(UsageError, match=f"scheduler_config.json: {key} is "):
        make_plan(str(tmp_path / "model"), tmp_path / "out", ConvertOptions(images="demo", device="cpu"))


@pytest.mark.parametrize("scale", [0, -1.0, float("nan"), float("inf"), "1", True, None])
def test_the_scale_of_a_lifted_model_is_a_positive_number(scale: Any, pixel_klein: Path, tmp_path: Path) -> None:
    shutil.copytree(pixel_klein, tmp_path / "model")
    path = tmp_path / "model" / "transformer" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lift_scale": scale}))
    with pytest.raises(UsageError, match="lift_scale is "):
        load_component(find_model(str(tmp_path / "model")), "transformer")


@pytest.mark.parametrize("prompt", ["a \udcff", "a \ud800 b"])
def test_half_characters_in_prompts_are_named(prompt: str) -> None:
    with pytest.raises(UsageError, match="no character of its own"):
        check_prompts(["sound", prompt])
    check_prompts(["sound", "\U0001f600 é"])


@pytest.mark.parametrize("place", ["transformer/diffusion_pytorch_model.safetensors", "latent/reference.safetensors"])
def test_a_loss_that_is_none_names_the_tensor_that_made_it_so(place: str, pixel_klein: Path, tmp_path: Path) -> None:
    shutil.copytree(pixel_klein, tmp_path / "model")
    tensors = load_file(tmp_path / "model" / place)
    with safe_open(tmp_path / "model" / place, "pt") as file:
        metadata = file.metadata()
    name = min(each for each in tensors if "proj" in each or "linear" in each)
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, tmp_path / "model" / place, metadata)
    recipe = load_recipe(
        "tiny-klein",
        [f"model={tmp_path / 'model'}", f"output={tmp_path / 'run'}", "steps=1", "batch_size=1", "validation.every=0",
         "previews.every=0", "precision=no", "data.sources=[{kind: demo, count: 2}]"],
    )  # fmt: skip
    with pytest.raises(LiftkitError, match=r"the loss is nan.*tensor '.*' holds NaN or infinity"):
        finetune(recipe, observer=Silent())
