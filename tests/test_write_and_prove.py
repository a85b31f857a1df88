"""What a conversion writes and proves, part by part: files, projections, card; and the hook into diffusers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import liftkit
from liftkit.checkpoint.components import read_components
from liftkit.checkpoint.header import Header
from liftkit.checkpoint.model import STEM, Weights, find_model
from liftkit.conversion import verify
from liftkit.conversion.card import model_card
from liftkit.conversion.inputs import copied_files
from liftkit.conversion.proof import Proof
from liftkit.conversion.verify import full_precision, prove
from liftkit.conversion.write import write_components, write_transformer
from liftkit.models.registry import architecture
from liftkit.models.surgery import convert_transformer, lifted_tensors, native_basis
from liftkit.progress import Silent
from tests import tiny

FILE = f"{STEM}.safetensors"


def plan_of(folder: Path, dtype: str = "auto") -> Any:
    """As much of a plan as writing needs."""
    model = find_model(str(folder))
    plan = SimpleNamespace(
        component="transformer",
        model=model,
        spec=architecture(str(model.class_of("transformer"))),
        config=model.config("transformer"),
        weights=model.weights("transformer"),
        options=SimpleNamespace(dtype=dtype),
        output=folder.parent / "pixel",
        transformer_bytes=0,
    )
    plan.transformers = [plan]
    return plan


def write(folder: Path, dtype: str = "auto") -> tuple[Any, Path]:
    """Write the pixel twin of a folder beside it, unproved."""
    plan = plan_of(folder, dtype)
    plan.copied_files, plan.made, _ = copied_files(plan.model, read_components(plan.model))
    plan.output.mkdir()
    write_components(plan, tiny.lift(), plan.output)
    write_transformer(plan, tiny.lift(), plan.output, Silent())
    return plan, plan.output


def proof_of(plan: Any, **choices: Any) -> Proof:
    return prove(plan.model.path, plan.output, plan.spec, tiny.lift(), steps=3, **choices)


@pytest.fixture
def source(architecture: str, model_folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of a tiny pipeline that a test may change."""
    return Path(shutil.copytree(model_folders[architecture], tmp_path / architecture))


def store_as(folder: Path, dtype: torch.dtype) -> None:
    path = folder / "transformer" / FILE
    save_file({name: tensor.to(dtype) for name, tensor in load_file(path).items()}, path, {"format": "pt"})


def rename(folder: Path, **names: str) -> None:
    """Rename the transformer's file; with an index of one shard where one is named."""
    target = folder / "transformer"
    tensors = load_file(target / FILE)
    (target / FILE).rename(target / names["file"])
    if "index" in names:
        index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, names["file"])}
        (target / names["index"]).write_text(json.dumps(index))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_is_written_exactly_and_proved(dtype: torch.dtype, source: Path) -> None:
    store_as(source, dtype)
    plan, output = write(source)
    proof = proof_of(plan)
    assert proof.exact < 1e-4
    assert proof.dtype == str(dtype).removeprefix("torch.")
    written = load_file(output / "transformer" / FILE)
    assert written["lift.basis"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert {tensor.dtype for name, tensor in written.items() if name != "lift.basis"} == {dtype}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_casting_rounds_the_product_once(dtype: str, source: Path) -> None:
    store_as(source, torch.float16)
    plan, output = write(source, dtype)
    assert proof_of(plan).dtype == dtype
    name = f"{plan.spec.inputs[0].path}.weight"
    weight = load_file(source / "transformer" / FILE)[name]
    product = weight.flatten(1).double() @ native_basis(tiny.lift(), plan.spec.inputs[0].order).T
    written = load_file(output / "transformer" / FILE)
    assert torch.equal(written[name].flatten(1), product.to(getattr(torch, dtype)))
    assert written["lift.basis"].dtype == torch.float32


def test_noise_on_any_stored_projection_fails_the_proof(source: Path) -> None:
    """A tenth of noise often stays within what bfloat16 may deviate; bit for bit it does not pass."""
    store_as(source, torch.bfloat16)
    plan, output = write(source)
    path = output / "transformer" / FILE
    honest = load_file(path)
    moved = lifted_tensors(plan.spec, plan.weights.read, tiny.lift())
    assert len(moved) >= 3
    for name in moved:
        noisy = honest[name] * (1 + 0.1 * torch.randn(honest[name].shape, dtype=honest[name].dtype))
        save_file({**honest, name: noisy}, path, {"format": "pt"})
        with pytest.raises(liftkit.ProofError, match=rf"the stored tensor '{name}' is not source times lift"):
            proof_of(plan)
    save_file({key: value for key, value in honest.items() if key != "lift.basis"}, path, {"format": "pt"})
    with pytest.raises(liftkit.ProofError, match=r"the stored tensor 'lift.basis' is missing"):
        proof_of(plan)


@pytest.mark.parametrize(
    ("names", "expected", "variant"),
    [
        ({"file": f"{STEM}.fp16.safetensors"}, {FILE}, "fp16"),
        (
            {"file": f"{STEM}.fp16-00001-of-00001.safetensors", "index": f"{STEM}.safetensors.index.fp16.json"},
            {f"{STEM}-00001-of-00001.safetensors", f"{FILE}.index.json"},
            "fp16",
        ),
        (
            {"file": f"{STEM}-00001-of-00001.safetensors", "index": f"{FILE}.index.json"},
            {f"{STEM}-00001-of-00001.safetensors", f"{FILE}.index.json"},
            None,
        ),
        ({"file": "part.safetensors", "index": f"{FILE}.index.json"}, {"part.safetensors", f"{FILE}.index.json"}, None),
    ],
)
def test_variants_and_indexes_of_one_shard(
    names: dict[str, str], expected: set[str], variant: str | None, source: Path
) -> None:
    rename(source, **names)
    plan, output = write(source)
    assert plan.weights.variant == variant
    assert {path.name for path in (output / "transformer").iterdir()} == {*expected, "config.json"}
    assert proof_of(plan).exact < 1e-4
    if "index" in names:
        shard = next(name for name in expected if name.endswith(".safetensors"))
        tensors = load_file(output / "transformer" / shard)
        index = json.loads((output / "transformer" / f"{FILE}.index.json").read_text())
        assert index["weight_map"] == dict.fromkeys(tensors, shard)
        assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors.values())


@pytest.mark.parametrize(
    ("variant", "names", "expected"),
    [
        ("fp16", [f"{STEM}.fp16.safetensors"], [FILE]),
        ("fp16", [f"{STEM}.fp16-00001-of-00002.safetensors"], [f"{STEM}-00001-of-00002.safetensors"]),
        (
            "fp16",
            ["a-b.fp16.safetensors", f"{STEM}.bf16-1-of-2.safetensors"],
            ["a-b.safetensors", f"{STEM}.bf16-1-of-2.safetensors"],
        ),
        ("fp16", ["model-1-of-2.fp16.safetensors"], ["model-1-of-2.safetensors"]),
        ("fp16", [f"{STEM}.fp16-1-of-2.safetensors", f"{STEM}-1-of-2.safetensors"], None),
        (None, [f"{STEM}.a-1-of-2.safetensors", f"{STEM}.b-1-of-2.safetensors"], None),
    ],
)
def test_plain_names_are_never_one(variant: str | None, names: list[str], expected: list[str] | None) -> None:
    headers = {name: Header(Path(name), {}, {}, 0) for name in names}
    assert Weights(headers, {}, True, variant).plain_names() == dict(zip(names, expected or names))


def test_full_precision_switches_tf32_off_and_on_again() -> None:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision("medium")
        torch.backends.cudnn.allow_tf32 = True
        with pytest.raises(RuntimeError, match="inside"), full_precision():
            assert not torch.backends.cuda.matmul.allow_tf32
            assert not torch.backends.cudnn.allow_tf32
            raise RuntimeError("inside")
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def test_memory_that_does_not_suffice(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    plan, _ = write(source)
    monkeypatch.setattr(verify, "_load", full)
    with pytest.raises(liftkit.LiftkitError, match=r"^--device cpu: not enough memory .* use --device cpu$"):
        proof_of(plan)


def test_lifted_tensors_have_the_dtype_that_is_asked_for() -> None:
    latent = tiny.sd3_transformer().to(torch.bfloat16)
    own, wide = (
        lifted_tensors(architecture("SD3Transformer2DModel"), latent.state_dict().get, tiny.lift(), dtype)
        for dtype in (None, torch.float64)
    )
    assert own.keys() == wide.keys() == {"pos_embed.proj.weight", "proj_out.weight", "proj_out.bias", "lift.basis"}
    assert own.pop("lift.basis").dtype == torch.float32
    assert {tensor.dtype for tensor in own.values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in wide.values()} == {torch.float64}
    assert all(torch.equal(tensor, wide[name].bfloat16()) for name, tensor in own.items())
    assert convert_transformer(latent, tiny.lift()).dtype == torch.bfloat16


def card(folder: Path, **figures: Any) -> str:
    plan = plan_of(folder)
    lift = tiny.lift(figures=figures)
    return model_card(SimpleNamespace(plan=plan, lift=lift, proof=Proof(1e-6, 2e-3, 8, (4, 6), "bfloat16")))


def test_the_card_shows_figures_where_there_are_some(source: Path) -> None:
    names = {"energy_captured": 0.9, "energy_best": 0.95, "r2_pixels": 0.5, "r2_pixels_linear": 0.6, "other": 1.0}
    text = card(source, alignment={"figures": {name: {"value": value} for name, value in names.items()}})
    assert "| pixel energy captured (best subspace) | 0.9000 (0.9500) |" in text
    assert "| ... by an unconstrained linear map | 0.600 |" in text
    assert "energy captured" not in card(source, kind="random")
    assert str(source) not in text


def test_the_card_s_example_has_the_model_s_size_and_text_length(source: Path) -> None:
    assert "height=16, width=16)" in card(source)
    (source / "tokenizer").mkdir()
    (source / "tokenizer" / "tokenizer_config.json").write_text('{"model_max_length": 12}')
    assert "height=16, width=16, max_sequence_length=12)" in card(source)
    index = json.loads((source / "model_index.json").read_text())
    index["tokenizer_3"] = ["transformers", "T5TokenizerFast"]
    (source / "model_index.json").write_text(json.dumps(index))
    config = json.loads((source / "vae" / "config.json").read_text())
    (source / "vae" / "config.json").write_text(json.dumps({**config, "sample_size": [32, 16]}))
    assert "height=32, width=32)" in card(source)


def test_the_license_comes_along(source: Path) -> None:
    (source / "LICENSE.md").write_text("terms")
    _, output = write(source)
    assert (output / "LICENSE.md").read_text() == "terms"


def test_asking_for_diffusers_does_not_spoil_importing_it() -> None:
    program = """
import sys, importlib.util
import liftkit
for _ in range(2):
    assert importlib.util.find_spec("diffusers") is not None
assert "diffusers" not in sys.modules
import diffusers
assert diffusers.AsymSD3Transformer2DModel is liftkit.AsymSD3Transformer2DModel
print(sum(type(finder).__module__ == "liftkit.models._diffusers" for finder in sys.meta_path))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    # One finder stays, for the modules of diffusers that are imported later.
    assert done.stdout == "1\n", done.stderr


def test_the_flow_of_tiny_klein_resumes_only_behind_its_own_vae(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tools import flow
    from tools.tiny_klein import assemble, common

    monkeypatch.setattr(common, "WORK", tmp_path)
    model, average = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    digest, other = torch.arange(32, dtype=torch.uint8), torch.zeros(32, dtype=torch.uint8)
    assert flow._resume(tmp_path, model, average, [], digest) == 0
    flow._save(tmp_path, 7, model, average, [], digest)
    assert flow._resume(tmp_path, model, average, [], digest) == 7
    assert "resumed at step 7" in capsys.readouterr().out
    assert flow._resume(tmp_path, torch.nn.Linear(3, 3), None, [], other) == 0
    assert "starting from zero" in capsys.readouterr().out
    state = common.load("flow-state.safetensors")
    common.save(tmp_path / "flow-state.safetensors", {key: value for key, value in state.items() if key != "vae"})
    assert flow._resume(tmp_path, model, average, [], digest) == 0
    monkeypatch.setattr(assemble, "MODEL", tmp_path / "model")
    (tmp_path / "model").mkdir()
    with pytest.raises(SystemExit, match=r"vae-sharp.safetensors is missing"):
        assemble.assemble()
    assert (tmp_path / "model").is_dir()
