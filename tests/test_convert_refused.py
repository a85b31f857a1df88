"""Models, lifts, images and options that convert refuses, and what is left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from liftkit.lift import Lift
from tests.converting import WEIGHTS, Cli, failed, klein, model

__all__ = ["klein", "model"]


def edit(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


@pytest.mark.parametrize("names", [("", "--images", "demo"), ("demo", "--images", "")])
def test_an_empty_name_is_not_the_current_folder(names: tuple[str, ...], cli: Cli, tmp_path: Path) -> None:
    """As of a variable of the shell that is not set."""
    failed(cli("convert", *names, "-o", tmp_path / "out"), "'': an empty name")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("nowhere", "no such folder"),
        (".", "model_index.json is missing"),
        ("file.safetensors", "a single file"),
        ("../escape/../none", "no such folder"),
        ("org/unknown-model", "the Hub did not give it"),
        ("model/transformer", "it is a component, did you mean"),
        ("modular", "it is a modular one"),
        ("models--a--b", "did you mean"),
        ("comfy", "it holds flux.safetensors, a single file"),
        ("old", "it holds model.ckpt, a single file, no folder: a pickle"),
        ("https://huggingface.co/org/name/tree/main", "did you mean the Hub id org/name?"),
        ("hf://org/name", "did you mean the Hub id org/name?"),
    ],
)
def test_a_path_that_is_no_model(where: str, expected: str, cli: Cli, image_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file.safetensors").write_bytes(b"x")
    files = ("model/model_index.json", "model/transformer/config.json", "modular/modular_model_index.json")
    for file in (*files, "models--a--b/snapshots/1f/model_index.json"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("{}")
    for file, content in (("comfy/flux.safetensors", b"\x02" + 7 * b"\0" + b"{}"), ("old/model.ckpt", b"PK\x03\x04")):
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).write_bytes(content)
    name = where if where.startswith(("org/", "h")) else str(tmp_path / where)
    failed(cli("convert", name, "--images", image_folder, "-o", tmp_path / "out"), expected)
    assert not (tmp_path / "out").exists()


def spoil_truncate(model: Path) -> None:
    path = model / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1000])


def spoil_pointer(model: Path) -> None:
    (model / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")


def spoil_pickle(model: Path) -> None:
    (model / WEIGHTS).unlink()
    torch.save({}, model / "transformer" / "diffusion_pytorch_model.bin")


def spoil_disguised_pickle(model: Path) -> None:
    torch.save({"x_embedder.weight": torch.zeros(3)}, model / WEIGHTS)


def spoil_missing_weights(model: Path) -> None:
    (model / WEIGHTS).unlink()


def spoil_missing_projection(model: Path) -> None:
    tensors = load_file(model / WEIGHTS)
    del tensors["x_embedder.weight"]
    save_file(tensors, model / WEIGHTS)


def spoil_no_vae(model: Path) -> None:
    edit(model / "model_index.json", vae=...)


def spoil_unknown_class(model: Path) -> None:
    edit(model / "model_index.json", transformer=["diffusers", "Flux2Transformer3DModel"])


def spoil_unet(model: Path) -> None:
    edit(model / "model_index.json", transformer=..., unet=["diffusers", "UNet2DConditionModel"])


def spoil_epsilon(model: Path) -> None:
    edit(model / "model_index.json", scheduler=["diffusers", "DDIMScheduler"])


def spoil_v_prediction(model: Path) -> None:
    edit(model / "model_index.json", scheduler=["diffusers", "DPMSolverMultistepScheduler"])
    edit(model / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")


def spoil_channels(model: Path) -> None:
    edit(model / "transformer" / "config.json", in_channels=96)


def spoil_json(model: Path) -> None:
    (model / "transformer" / "config.json").write_text("{")


def spoil_other_vae(model: Path) -> None:
    edit(model / "model_index.json", vae=["diffusers", "VQModel"])


SPOILED = {
    spoil_truncate: ("truncated", WEIGHTS),
    spoil_pointer: ("git-lfs pointer", "git lfs pull"),
    spoil_pickle: ("pickle, which liftkit never opens", "safe_serialization"),
    spoil_disguised_pickle: ("pickle, which liftkit never opens",),
    spoil_missing_weights: ("is missing; is the model folder complete",),
    spoil_missing_projection: ("x_embedder.weight", "missing"),
    spoil_no_vae: ("no VAE",),
    spoil_unknown_class: ("did you mean Flux2Transformer2DModel",),
    spoil_unet: ("unet", "flow transformers"),
    spoil_epsilon: ("DDIMScheduler", "not of a flow model"),
    spoil_v_prediction: ("v_prediction", "not of a flow model"),
    spoil_channels: ("96", "4 x 2 x 2 = 16"),
    spoil_json: ("no valid JSON", "config.json"),
    spoil_other_vae: ("VQModel", "AutoencoderKLFlux2"),
}


@pytest.mark.parametrize("spoil", list(SPOILED), ids=lambda spoil: spoil.__name__.removeprefix("spoil_"))
def test_spoiled_models(
    spoil: Callable[[Path], None], cli: Cli, klein: Path, image_folder: Path, tmp_path: Path
) -> None:
    spoil(klein)
    failed(cli("convert", klein, "--images", image_folder, "-o", tmp_path / "out"), *SPOILED[spoil])
    assert [path.name for path in tmp_path.iterdir()] == ["klein"]


def test_a_converted_model_is_not_converted_again(cli: Cli, converted: dict[str, Path], tmp_path: Path) -> None:
    failed(cli("convert", converted["sd3"], "--images", "demo", "-o", tmp_path / "out"), "already a pixel model")


def test_images_that_will_not_do(cli: Cli, model: Path, tmp_path: Path) -> None:
    def convert(images: object, *more: object) -> tuple[int, str, str]:
        return cli("convert", model, "--images", images, "-o", tmp_path / "out", "--device", "cpu", *more)

    failed(convert(tmp_path / "none"), "no such folder")
    (tmp_path / "empty").mkdir()
    failed(convert(tmp_path / "empty"), "no image files")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"not a picture")
    failed(convert(tmp_path / "broken"), "1 text, not a picture (a.png)")
    (tmp_path / "small").mkdir()
    Image.new("RGB", (3, 3)).save(tmp_path / "small" / "b.png")
    failed(convert(tmp_path / "small"), "1 smaller than a patch (b.png)")
    (tmp_path / "few").mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (4, 8, 3), dtype=np.uint8)).save(
        tmp_path / "few" / "c.png"
    )
    failed(convert(tmp_path / "few"), "1 tokens cannot determine a basis of rank 16", "give more images")
    failed(cli("convert", model, "-o", tmp_path / "out"), "--images is missing")
    failed(convert("demo", "--resolution", 2), "--resolution 2")
    assert not (tmp_path / "out").exists()


def test_unreadable_images_among_good_ones_are_counted_named_and_skipped(
    cli: Cli, model: Path, image_folder: Path, tmp_path: Path
) -> None:
    mixed = Path(shutil.copytree(image_folder, tmp_path / "mixed"))
    (mixed / "inner" / "broken.jpg").write_bytes((mixed / "04.png").read_bytes()[:60])
    Image.new("RGB", (2, 2)).save(mixed / "tiny.png")
    (mixed / "notes.txt").write_text("no picture")
    code, _, err = cli("convert", model, "--images", mixed, "-o", tmp_path / "out", "--device", "cpu")
    assert code == 0
    assert "1 truncated (inner/broken.jpg)" in " ".join(err.split())
    assert "1 smaller than a patch (tiny.png)" in " ".join(err.split())
    assert json.loads((tmp_path / "out" / "alignment.json").read_text())["alignment"]["images"] == 40


def test_lifts_that_do_not_fit(cli: Cli, model: Path, tmp_path: Path) -> None:
    random = torch.linalg.qr(torch.randn(108, 16))[0]
    Lift(random, 1.0, patch_size=6, latent_patch=2).save(tmp_path / "lift.safetensors")
    arguments = ("convert", model, "-o", tmp_path / "out", "--lift")
    failed(cli(*arguments, tmp_path / "lift.safetensors"), "pixel patch 6, the model needs 4")
    failed(cli(*arguments, tmp_path / "none.safetensors"), "--lift", "no such file")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        (("--device", "abacus"), "--device abacus"),
        (("--color", "cmyk"), "cmyk"),
        (("--dtype", "int4"), "int4"),
        (("--num-images", "0"), "num-images"),
        (("--frobnicate",), "frobnicate"),
    ],
)
def test_unknown_options(option: tuple[str, ...], expected: str, cli: Cli, model: Path, tmp_path: Path) -> None:
    code, _, err = cli("convert", model, "--images", "demo", "-o", tmp_path / "out", *option)
    assert code == 2
    assert expected in err
    assert not (tmp_path / "out").exists()


def test_places_that_cannot_be_written(cli: Cli, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed(cli("convert", model, "--images", "demo", "-o", tmp_path / "no" / "out"), "no such folder")
    (tmp_path / "file").write_text("")
    failed(cli("convert", model, "--images", "demo", "-o", tmp_path / "file", "--overwrite"), "is a file")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type(usage)(usage.total, usage.total - 5, 5))
    failed(cli("convert", model, "--images", "demo", "-o", tmp_path / "out"), "GB are needed and 0.00 GB are free")
