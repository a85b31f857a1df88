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
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import liftkit
from liftkit.checkpoint.folder import SUFFIX
from liftkit.checkpoint.follow import digest_file
from liftkit.lift import Lift
from tests import tiny
from tests.converting import WEIGHTS, Cli, failed, klein, model

__all__ = ["klein", "model"]


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
