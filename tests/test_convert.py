"""``liftkit convert`` and ``sample`` as users see them: what comes out, and what bad input says."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import liftkit
from liftkit.checkpoint.folder import SUFFIX
from liftkit.checkpoint.follow import digest_file
from liftkit.lift import Lift
from tests import tiny

Cli = Callable[..., tuple[int, str, str]]
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def model(architecture: str, model_folders: dict[str, Path]) -> Path:
    return model_folders[architecture]


@pytest.fixture
def klein(model_folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the tiny klein that a test may spoil."""
    return Path(shutil.copytree(model_folders["flux2"], tmp_path / "klein"))


def failed(result: tuple[int, str, str], *expected: str, code: int = 2) -> None:
    """One clear line on stderr, the exit code, no traceback."""
    status, _, err = result
    assert status == code, err
    lines = [line for line in err.splitlines() if line.startswith("error")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    for text in expected:
        assert text in lines[0], lines[0]


def edit(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def test_converts_through_the_command_line(cli: Cli, model: Path, image_folder: Path, tmp_path: Path) -> None:
    code, out, err = cli("convert", model, "--images", image_folder, "-o", tmp_path / "pixel", "--device", "cpu")
    assert code == 0, err
    for text in ("rank 16 of 48", "energy captured", "deviation", "copied byte for byte", "liftkit sample"):
        assert text in out
    found = {path.name for path in (tmp_path / "pixel").iterdir()}
    assert found >= {
        "README.md", "alignment.html", "alignment.json", "latent", "lift.safetensors", "liftkit.json",
        "model_index.json", "pipeline.py", "scheduler", "transformer", "vae",
    }  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["pixel"]


def test_the_folder_says_what_it_is(architecture: str, converted: dict[str, Path]) -> None:
    folder = converted[architecture]
    record = json.loads((folder / "liftkit.json").read_text())
    assert record["digests"].keys() == {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "liftkit.json"
    }
    assert all(digest_file(folder / name).value == digest for name, digest in record["digests"].items())
    assert record["proof"]["exact"] < 1e-4
    assert record["versions"]["torch"]
    report = json.loads((folder / "alignment.json").read_text())
    assert report["alignment"]["images"] == 40
    values = {name: entry["value"] for name, entry in report["alignment"]["figures"].items()}
    assert 0 < values["energy_captured"] <= values["energy_best"] <= 1
    page = (folder / "alignment.html").read_text()
    # Each picture stands in a place of its own, so that a tap enlarges it.
    assert page.count("data:image/png;base64,") == page.count("<img ") == page.count('aria-label="enlarge"') == 56
    assert not re.search(r'(src|href)="(?!data:|#)|url\((?!#)', page), "nothing is fetched"
    assert "from_pretrained" in (folder / "README.md").read_text()
    for path in folder.rglob("*"):
        assert path.is_dir() or path.stat().st_mode & 0o777 == 0o666 & ~_umask(), path


def test_projections_are_the_products_rounded_once(model_folders: dict[str, Path], converted: dict[str, Path]) -> None:
    source, target = (load_file(folders["flux2"] / WEIGHTS) for folders in (model_folders, converted))
    lift = Lift.load(converted["flux2"] / "lift.safetensors")
    basis = liftkit.models.surgery.native_basis(lift, "cpq")
    product = source["x_embedder.weight"].double() @ basis.T
    torch.testing.assert_close(target["x_embedder.weight"].double(), product, rtol=1e-6, atol=1e-7)
    for name in source.keys() - {"x_embedder.weight", "proj_out.weight"}:
        assert torch.equal(source[name], target[name])
    reference = load_file(converted["flux2"] / "latent" / "reference.safetensors")
    assert reference.keys() == {"x_embedder.weight", "proj_out.weight", "norm_out.linear.weight"}
    assert all(torch.equal(reference[name], source[name]) for name in reference)


def test_same_input_same_bytes(
    model: Path, image_folder: Path, converted: dict[str, Path], architecture: str, tmp_path: Path
) -> None:
    liftkit.convert(str(model), tmp_path / "again", images=str(image_folder), device="cpu")
    first = json.loads((converted[architecture] / "liftkit.json").read_text())["digests"]
    again = json.loads((tmp_path / "again" / "liftkit.json").read_text())["digests"]
    assert first == again
    names = [folder / "liftkit.json" for folder in (converted[architecture], tmp_path / "again")]
    assert names[0].read_bytes() == names[1].read_bytes()


def test_sharded_checkpoints_stay_sharded(klein: Path, image_folder: Path, tmp_path: Path) -> None:
    whole = load_file(klein / WEIGHTS)
    model = tiny.flux2_transformer()
    model.load_state_dict(whole)
    shutil.rmtree(klein / "transformer")
    model.save_pretrained(klein / "transformer", max_shard_size="20KB")
    assert len(list((klein / "transformer").glob("*.safetensors"))) > 2
    result = liftkit.convert(str(klein), tmp_path / "pixel", images=str(image_folder), device="cpu")
    assert result.proof.exact < 1e-4
    index = json.loads((tmp_path / "pixel/transformer/diffusion_pytorch_model.safetensors.index.json").read_text())
    assert "lift.basis" in index["weight_map"]
    loaded = liftkit.AsymFlux2Transformer2DModel.from_pretrained(tmp_path / "pixel" / "transformer")
    assert loaded.lift.basis.abs().sum() > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_of_the_written_transformer(dtype: str, klein: Path, image_folder: Path, tmp_path: Path) -> None:
    halved = {key: value.bfloat16() for key, value in load_file(klein / WEIGHTS).items()}
    save_file(halved, klein / WEIGHTS, {"format": "pt"})
    result = liftkit.convert(str(klein), tmp_path / "p", images=str(image_folder), device="cpu", dtype=dtype)
    written = load_file(tmp_path / "p" / WEIGHTS)
    assert {str(v.dtype) for k, v in written.items() if k != "lift.basis"} == {f"torch.{dtype}"}
    assert written["lift.basis"].dtype == torch.float32
    assert result.proof.exact < 1e-4
    basis = liftkit.models.surgery.native_basis(Lift.load(tmp_path / "p" / "lift.safetensors"), "cpq")
    product = halved["x_embedder.weight"].double() @ basis.T
    assert torch.equal(written["x_embedder.weight"], product.to(getattr(torch, dtype)))


def test_a_saved_lift_is_reused(
    cli: Cli, model_folders: dict[str, Path], converted: dict[str, Path], tmp_path: Path
) -> None:
    saved = converted["flux2"] / "lift.safetensors"
    code, _, err = cli("convert", model_folders["flux2"], "--lift", saved, "-o", tmp_path / "again", "--device", "cpu")
    assert code == 0, err
    assert digest_file(tmp_path / "again" / WEIGHTS) == digest_file(converted["flux2"] / WEIGHTS)


def test_dry_run_writes_nothing(cli: Cli, model: Path, image_folder: Path, tmp_path: Path) -> None:
    code, out, _ = cli(
        "convert", model, "--images", image_folder, "-o", tmp_path / "pixel", "--dry-run", "--device", "cpu"
    )
    assert code == 0
    assert "dry run: nothing was written" in out
    assert "lift.basis (48, 16)" in out
    assert not list(tmp_path.iterdir())


def test_existing_output_is_kept_unless_told(cli: Cli, model: Path, image_folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "pixel"
    target.mkdir()
    (target / "precious").write_text("mine")
    arguments = ("convert", model, "--images", image_folder, "-o", target, "--device", "cpu")
    failed(cli(*arguments), "exists already", "--overwrite")
    assert (target / "precious").read_text() == "mine"
    failed(cli(*arguments, "--overwrite"), "liftkit")
    assert (target / "precious").read_text() == "mine", "a folder that liftkit did not make is never replaced"
    (target / "precious").unlink()
    assert cli(*arguments, "--overwrite")[0] == 0
    first = (target / "liftkit.json").read_bytes()
    assert cli(*arguments, "--overwrite", "--seed", 1)[0] == 0
    assert (target / "liftkit.json").read_bytes() != first


@pytest.mark.parametrize("where", ["itself", "above"])
def test_the_source_is_never_replaced(where: str, cli: Cli, klein: Path, image_folder: Path) -> None:
    (klein / "liftkit.json").write_text("{}")
    (klein.parent / "liftkit.json").write_text("{}")
    target = klein if where == "itself" else klein.parent
    failed(
        cli("convert", klein, "--images", image_folder, "-o", target, "--overwrite"),
        "holds the model",
        "another output",
    )
    assert (klein / WEIGHTS).exists()


def test_no_output_lies_inside_of_its_source(cli: Cli, klein: Path, image_folder: Path) -> None:
    before = sorted(klein.rglob("*"))
    for target in (klein / "pixel", klein / "transformer" / "pixel"):
        failed(cli("convert", klein, "--images", image_folder, "-o", target), "inside of the model", "another output")
    assert sorted(klein.rglob("*")) == before


def test_license_is_inherited(klein: Path, image_folder: Path, tmp_path: Path) -> None:
    (klein / "README.md").write_text(
        "---\nlicense: other\nlicense_name: flux-non-commercial\ntags: [x]\n---\n# klein\n"
    )
    liftkit.convert(str(klein), tmp_path / "pixel", images=str(image_folder), device="cpu")
    card = (tmp_path / "pixel" / "README.md").read_text()
    assert "license: other\n" in card
    assert "flux-non-commercial" in card
    assert str(tmp_path) not in card


# ---------------------------------------------------------------------------------------------- bad input


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
    failed(cli(*arguments, tmp_path / "none.safetensors"), "cannot be read")
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


def test_a_failed_proof_leaves_nothing_behind(
    cli: Cli, model: Path, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sabotage the surgery: the proof has to find it."""
    from liftkit.models import surgery

    monkeypatch.setattr(
        surgery, "lift_output", lambda weight, basis, dtype: (basis @ weight.double()).flip(0).to(dtype)
    )
    result = cli("convert", model, "--images", image_folder, "-o", tmp_path / "out", "--device", "cpu")
    failed(result, "the proof failed", "discarded", code=1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("proof", "match"), [("model", "."), ("projections", "tensor '.*' is not what .* holds")])
def test_a_spoiled_unchanged_tensor_fails_the_proof(
    proof: str, match: str, model: Path, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from liftkit.checkpoint import rewrite

    honest = rewrite.copy_range

    def careless(source, offset, size, target, position, told):
        honest(source, offset + 64, size - 64, target, position, told)
        os.pwrite(target.fileno(), bytes(64), position + size - 64)
        told(64, position + size)

    monkeypatch.setattr(rewrite, "copy_range", careless)
    with pytest.raises(liftkit.ProofError, match=match):
        liftkit.convert(str(model), tmp_path / "out", images=str(image_folder), device="cpu", proof=proof)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("moment", ["fit", "write", "prove"])
def test_ctrl_c_leaves_nothing_behind(
    moment: str, model_folders: dict[str, Path], image_folder: Path, tmp_path: Path
) -> None:
    # A shell that starts tests in the background makes them deaf to Ctrl-C, and children inherit that.
    program = f"""
import sys, time, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from liftkit.cli import app, console
stage = console.Bars.stage
def slow(self, title, total, unit):
    if title.startswith({moment!r}):
        print("now", flush=True)
        time.sleep(30)
    return stage(self, title, total, unit)
console.Bars.stage = slow
sys.argv = ["liftkit", "convert", {str(model_folders["flux2"])!r}, "--images", {str(image_folder)!r},
            "-o", {str(tmp_path / "out")!r}, "--device", "cpu"]
app.run()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == "now":
            break
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "interrupted" in err
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_leftovers_of_killed_runs_are_removed(model: Path, image_folder: Path, tmp_path: Path) -> None:
    stale = tmp_path / f".out.{os.getppid()}-0a{SUFFIX}"
    other = tmp_path / f".other.{os.getppid()}-0a{SUFFIX}"
    stale.mkdir()
    other.mkdir()
    liftkit.convert(str(model), tmp_path / "out", images=str(image_folder), device="cpu")
    assert not stale.exists()
    assert other.exists(), "another folder's leftover is not ours"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_the_plan_says_what_it_found_among_the_images(cli: Cli, model_folders: dict[str, Path], tmp_path: Path) -> None:
    for index in range(3):
        Image.new("RGB", (24, 20), (40 * index, 90, 30)).save(tmp_path / f"{index}.png")
    Image.new("RGB", (2, 2)).save(tmp_path / "small.png")
    (tmp_path / "page.jpg").write_text("<html>")
    model = model_folders["flux2"]
    code, out, _ = cli("--json", "convert", model, "--images", tmp_path, "--dry-run", "-o", tmp_path / "out")
    found = json.loads(out)["plan"]["reasons"]["images"]
    assert code == 0
    assert found.startswith("3 of 5 images used; left out: ")
    assert "small.png" in found
    assert "page.jpg" in found
    (tmp_path / "none").mkdir()
    (tmp_path / "page.jpg").rename(tmp_path / "none" / "page.jpg")
    code, _, err = cli("convert", model, "--images", tmp_path / "none", "--dry-run", "-o", tmp_path / "out")
    assert code == 2
    assert "none of 1 images can be used" in err
