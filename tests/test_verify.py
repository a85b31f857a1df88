"""``liftkit verify``: every file and every tensor of a converted folder, spoiled one by one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import liftkit
from liftkit.checkpoint.header import read_header
from liftkit.checkpoint.record import read_record
from liftkit.conversion.audit import Audit, Check, audit
from liftkit.conversion.manifest import compared
from liftkit.progress import Silent
from tests import tiny

Cli = Callable[..., tuple[int, str, str]]
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def proved(model_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small converted folders, in bfloat16; not to be changed."""
    root = tmp_path_factory.mktemp("proved")
    tiny.lift().save(root / "lift.safetensors")
    for name, folder in model_folders.items():
        choices: dict[str, Any] = {"dtype": "bfloat16", "device": "cpu", "proof": "projections"}
        liftkit.convert(str(folder), root / name, lift=root / "lift.safetensors", **choices)
    return {name: root / name for name in model_folders}


@pytest.fixture
def folder(proved: dict[str, Path], tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(proved["flux2"], tmp_path / "pixel"))


def problems(found: Audit) -> dict[str, list[str]]:
    return {check.name: check.problems for check in found.checks if not check.ok}


def flip(path: Path, place: int, bit: int = 0) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ (1 << bit)]))


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change tensors of a file, and the manifest with it: what a careful liar would do."""
    from liftkit.checkpoint.follow import digest_file

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata)
    root = next(parent for parent in path.parents if (parent / "liftkit.json").exists())
    record = json.loads((root / "liftkit.json").read_text())
    record["digests"][path.relative_to(root).as_posix()] = digest_file(path).value
    (root / "liftkit.json").write_text(json.dumps(record))


def test_weights_that_are_not_finite_are_named(folder: Path) -> None:
    name = "norm_out.linear.weight"
    rewrite(folder / WEIGHTS, lambda tensors: tensors[name].view(-1)[3:4].fill_(float("nan")))
    assert f"{WEIGHTS}: tensor {name!r} holds NaN or infinite numbers" in problems(audit(folder))["manifest"]


def test_a_whole_folder_passes(
    architecture: str, cli: Cli, proved: dict[str, Path], model_folders: dict[str, Path]
) -> None:
    code, out, err = cli("verify", proved[architecture], "--source", model_folders[architecture])
    assert code == 0, err
    for text in (
        "by BLAKE3",
        "of its names and shapes",
        "max |A^T A - I|",
        "source times lift, rounded once",
        "byte for byte",
    ):
        assert text in out
    code, out, _ = cli("verify", proved[architecture], "--json")
    assert code == 0
    found = json.loads(out)
    assert found["ok"] is True
    assert [check["name"] for check in found["checks"]] == ["manifest", "weights", "components", "basis", "lift"]
    assert all(check["ok"] and check["detail"] for check in found["checks"])


def test_a_flipped_bit_is_found_by_file_and_tensor(folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    files = [path for path in sorted(folder.rglob("*.safetensors")) if read_header(path).tensors]
    assert len(files) == 5
    for path in files:
        header = read_header(path)
        for _ in range(3):
            name = sorted(header.tensors)[torch.randint(len(header.tensors), (1,), generator=generator).item()]
            entry = header.tensors[name]
            place = header.payload + entry.start + int(torch.randint(entry.size, (1,), generator=generator))
            bit = int(torch.randint(8, (1,), generator=generator))
            flip(path, place, bit)
            said = problems(audit_manifest(folder))["manifest"]
            where = f"{path.relative_to(folder).as_posix()}: "
            # A bit of an exponent may make a number that is none, which is said as well.
            also = [line for line in said[1:] if not line.endswith("holds NaN or infinite numbers")]
            assert (said[0], also) == (f"{where}changed: tensor {name!r}", [])
            flip(path, place, bit)
    assert audit_manifest(folder).ok


def audit_manifest(folder: Path) -> Audit:
    """The first check alone: it looks at bytes, and needs no model."""
    return Audit(folder, [Check("manifest", *compared(folder, read_record(folder), Silent()))])


def test_many_tensors_and_a_header_that_changed(folder: Path) -> None:
    header = read_header(folder / WEIGHTS)
    names = sorted(header.tensors)
    for name in names:
        flip(folder / WEIGHTS, header.payload + header.tensors[name].start)
    (said,) = problems(audit_manifest(folder))["manifest"]
    assert said == f"{WEIGHTS}: changed: tensor {', '.join(map(repr, names[:3]))} and {len(names) - 3} more"
    for name in names:
        flip(folder / WEIGHTS, header.payload + header.tensors[name].start)
    raw = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(raw.replace(b'"format":"pt"', b'"format":"xy"', 1))
    (said,) = problems(audit_manifest(folder))["manifest"]
    assert said == f"{WEIGHTS}: changed: its header, or the order of its bytes"


def test_every_file_counts(folder: Path) -> None:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "liftkit.json"]
    assert len(files) > 10
    for path in files:
        name, content = path.relative_to(folder).as_posix(), path.read_bytes()
        path.unlink()
        assert problems(audit_manifest(folder)) == {"manifest": [f"{name}: missing"]}
        path.write_bytes(content[:-1] if content else b"x")
        (said,) = problems(audit_manifest(folder))["manifest"]
        assert said.startswith(f"{name}: changed")
        path.write_bytes(content)
    (folder / "transformer" / "extra.safetensors").write_bytes(b"")
    (folder / ".gitattributes").write_text("*")
    (folder / ".cache" / "huggingface").mkdir(parents=True)
    (folder / ".cache" / "huggingface" / "x.lock").write_text("")
    assert problems(audit_manifest(folder)) == {"manifest": ["transformer/extra.safetensors: not in the manifest"]}


def test_damage_is_reported_with_exit_code_1(cli: Cli, folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-7])
    (folder / "scheduler" / "scheduler_config.json").unlink()
    code, out, err = cli("verify", folder)
    assert code == 1
    assert f"manifest: {WEIGHTS}: changed" in err
    assert "manifest: scheduler/scheduler_config.json: missing" in err
    assert "truncated" in err
    assert "Traceback" not in err
    assert out.count("FAILED") == 5
    code, out, _ = cli("verify", folder, "--json")
    assert code == 1
    assert json.loads(out)["ok"] is False


def test_what_is_no_converted_folder(cli: Cli, folder: Path, model_folders: dict[str, Path]) -> None:
    nobody = Path("~nobody-of-this-name/pixel")
    for place, said in (
        (nobody, "no such folder"),
        (folder / "none", "no such folder"),
        (model_folders["sd3"], "liftkit.json is missing"),
    ):
        code, _, err = cli("verify", place)
        assert code == 2
        assert said in err
    for content, said in (("{", "no valid JSON"), ("[]", "expected a JSON object"), ('{"sha256": {}}', "no manifest")):
        (folder / "liftkit.json").write_text(content)
        code, _, err = cli("verify", folder)
        assert code == 1
        assert f"manifest: {folder / 'liftkit.json'}" in err
        assert said in err


def turn(tensors: dict[str, torch.Tensor]) -> None:
    tensors["proj_out.weight"] = tensors["proj_out.weight"].flip(0)


def nudge(tensors: dict[str, torch.Tensor]) -> None:
    """One unit in the last place of one number."""
    weight = tensors["x_embedder.weight"]
    weight.view(torch.int16)[0, 0] += 1


def stretch(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lift.basis"] = tensors["lift.basis"] * 1.001


def other_norm(tensors: dict[str, torch.Tensor]) -> None:
    tensors["norm_out.linear.weight"][0, 0] += 1


def reshape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["norm_out.linear.weight"] = tensors["norm_out.linear.weight"].reshape(-1)


def drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["norm_out.linear.weight"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (turn, {"lift": "'proj_out.weight' is not source times lift"}),
        (nudge, {"lift": "'x_embedder.weight' is not source times lift"}),
        (stretch, {"basis": "not orthonormal", "lift": "'lift.basis' is not source times lift"}),
        (other_norm, {"lift": "'norm_out.linear.weight' is not the source's"}),
        (
            reshape,
            {
                "weights": "'norm_out.linear.weight': found",
                "components": "cannot be loaded",
                "lift": "is not the source's",
            },
        ),
        (
            drop,
            {
                "weights": "'norm_out.linear.weight': found none",
                "components": "1 tensors of the",
                "lift": "is not the source's",
            },
        ),
    ],
)
def test_a_manifest_that_lies_along_does_not_help(
    change: Callable[[dict[str, torch.Tensor]], None], expected: dict[str, str], folder: Path
) -> None:
    rewrite(folder / WEIGHTS, change)
    found = problems(audit(folder))
    assert found.keys() == expected.keys()
    for name, text in expected.items():
        assert any(text in line for line in found[name]), found


def test_the_source_tells_what_the_folder_alone_cannot(folder: Path, model_folders: dict[str, Path]) -> None:
    name = "single_transformer_blocks.0.attn.to_out.weight"
    rewrite(folder / WEIGHTS, lambda tensors: tensors[name].view(torch.int16)[0].add_(1))
    assert audit(folder).ok, "a tensor between the projections may be anything"
    (said,) = problems(audit(folder, str(model_folders["flux2"])))["source"]
    assert f"tensor {name!r} is not what" in said
    (said,) = problems(audit(folder, str(model_folders["sd3"])))["source"]
    assert "is missing" in said or "not together" in said


@pytest.mark.parametrize(
    ("path", "changes", "expected"),
    [
        ("transformer/config.json", {"lift_scale": 2.0}, "has the scale 2.0, the lift 1.7"),
        ("scheduler/scheduler_config.json", {"lift_scale": None}, "scheduler: its config has the scale None"),
        ("transformer/config.json", {"lift_rank": "x"}, "lift_rank is missing or no number"),
        ("transformer/config.json", {"_class_name": "Flux2Transformer2DModel"}, "no pixel model"),
        ("transformer/config.json", {"in_channels": 8}, "the lift does not fit"),
        ("transformer/config.json", {"num_attention_heads": "many"}, "cannot be made from it"),
        ("transformer/config.json", {"num_layers": 2}, "'transformer_blocks.1."),
    ],
)
def test_configs_that_lie(path: str, changes: dict[str, object], expected: str, folder: Path) -> None:
    content = json.loads((folder / path).read_text())
    (folder / path).write_text(json.dumps({**content, **changes}))
    found = problems(audit(folder))
    assert any(expected in line for lines in found.values() for line in lines), found


def test_links_out_of_the_folder_are_not_followed(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (folder / "latent" / "link.txt").symlink_to(tmp_path / "secret")
    (folder / "loop").symlink_to(folder)
    found = problems(audit(folder))
    assert "a link out of the model folder" in found["manifest"][0]
    (folder / "latent" / "link.txt").unlink()
    assert "round in a circle" in problems(audit(folder))["manifest"][0]
    (folder / "loop").unlink()
    os.mkfifo(folder / "pipe.safetensors")
    assert "neither a file nor a folder" in problems(audit(folder))["manifest"][0]


def test_names_in_a_manifest_open_nothing(folder: Path, tmp_path: Path) -> None:
    record = json.loads((folder / "liftkit.json").read_text())
    record["digests"]["../secret"] = "00"
    (tmp_path / "secret").write_text("secret")
    (folder / "liftkit.json").write_text(json.dumps(record))
    assert problems(audit(folder)) == {"manifest": ["../secret: missing"]}


def test_a_finetuned_folder_is_no_longer_source_times_lift(folder: Path) -> None:
    rewrite(folder / WEIGHTS, turn)
    record = json.loads((folder / "liftkit.json").read_text())
    (folder / "liftkit.json").write_text(json.dumps({**record, "finetune": {"steps": 1}}))
    found = audit(folder)
    assert found.ok
    assert "finetuned since" in next(check.detail for check in found.checks if check.name == "lift")


def test_products_of_another_machine_may_differ_in_the_last_bit_of_float64() -> None:
    from liftkit.conversion.audit import SLACK
    from liftkit.conversion.verify import mismatch

    class Stored:
        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor

        def read(self, name: str) -> torch.Tensor:
            return self.tensor

    product = torch.randn(50, 50, dtype=torch.float64)
    for dtype in (torch.float64, torch.float32):
        stored: Any = Stored((product * (1 + 2.0**-52)).to(dtype))
        assert mismatch(stored, "a", product, SLACK) == ""
        wrong: Any = Stored((product.to(dtype).nextafter(torch.tensor(9.0, dtype=dtype))).to(dtype))
        assert bool(mismatch(wrong, "a", product, SLACK)) == (dtype is torch.float32)
    assert mismatch(Stored(product * (1 + 2.0**-52)), "a", product)  # type: ignore[arg-type]
    assert mismatch(Stored(product[:3]), "a", product, SLACK)  # type: ignore[arg-type]
