"""Adapters: base and adapter in one call are the merged folder; what does not belong together changes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Flux2Transformer2DModel
from PIL import Image

import liftkit
from liftkit.checkpoint.folder import manifest
from liftkit.conversion.audit import audit
from liftkit.embedded import TINY_KLEIN
from liftkit.errors import UsageError
from liftkit.formats.adapters import fuse, keep
from liftkit.lift import Lift
from liftkit.models.adapter import LORA_A, LORA_B, Adapter, is_adapter
from tests import tiny
from tests.adapters import RANK, random_adapter, random_tensors
from tests.test_pipelines import load

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def adapter(architecture: str, converted: dict[str, Path]) -> Adapter:
    return random_adapter(converted[architecture])


@pytest.fixture(scope="module")
def saved(adapter: Adapter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    adapter.save(folder, "# card\n")
    return folder


@pytest.fixture(scope="module")
def merged(architecture: str, saved: Path, model_folders: dict[str, Path]) -> Path:
    """Merged into the latent base, beside the adapter."""
    done = fuse(saved, str(model_folders[architecture]), saved.parent / "merged")
    assert done.proof is not None
    return done.output


def image(name: str, pipeline: Any) -> torch.Tensor:
    flow = liftkit.open_flow(pipeline.transformer)
    noise = torch.randn(1, 3 if flow.is_pixel else 4, *((16, 16) if flow.is_pixel else (8, 8)))
    arguments = {"height": 16, "width": 16, "num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "pt"}
    latents = flow.pipeline_state(noise)
    return pipeline(**tiny.prompt_arguments(name), latents=latents, **arguments).images


@pytest.mark.parametrize("kind", ["latent", "converted"])
def test_base_and_adapter_are_the_merged_folder(
    kind: str,
    architecture: str,
    saved: Path,
    merged: Path,
    model_folders: dict[str, Path],
    converted: dict[str, Path],
    tmp_path: Path,
) -> None:
    base = {"latent": model_folders, "converted": converted}[kind][architecture]
    if kind == "converted":
        assert fuse(saved, str(base), tmp_path / "merged").proof is None
        merged = tmp_path / "merged"
    whole, applied = load(merged), liftkit.load_adapter(load(base), saved)
    state = applied.transformer.state_dict()
    assert state.keys() == whole.transformer.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in whole.transformer.state_dict().items())
    assert applied.scheduler.config.lift_scale == whole.scheduler.config.lift_scale
    assert applied.vae.config.color == whole.vae.config.color
    torch.manual_seed(3)
    expected = image(architecture, whole)
    torch.manual_seed(3)
    # Other memory: what is the same to the last bit is the weights.
    torch.testing.assert_close(image(architecture, applied), expected, rtol=1e-4, atol=1e-4)
    torch.manual_seed(3)
    assert not torch.allclose(image(architecture, load(converted[architecture])), expected, atol=1e-2)


def test_the_merged_folder_is_whole(architecture: str, merged: Path) -> None:
    record = json.loads((merged / "liftkit.json").read_text())
    found = manifest(merged)
    found.pop("liftkit.json")
    assert record["digests"] == found
    assert record["finetune"]["rank"] == RANK
    assert record["source"]["model"] == architecture
    assert audit(merged).ok
    assert {path.name for path in merged.parent.iterdir()} == {"adapter", "merged"}
    assert not (merged / "conversion").exists()
    assert (merged / "latent" / "reference.safetensors").is_file()


def test_an_adapter_survives_its_folder(adapter: Adapter, saved: Path) -> None:
    again = Adapter.load(saved)
    assert is_adapter(saved)
    assert again.tensors.keys() == adapter.tensors.keys()
    assert all(torch.equal(tensor, again.tensors[name]) for name, tensor in adapter.tensors.items())
    assert again.lift is not None
    assert adapter.lift is not None
    assert torch.equal(again.lift.basis, adapter.lift.basis)
    assert (again.alpha, again.transformer, again.base) == (adapter.alpha, adapter.transformer, "tiny")
    assert again.provenance == {"steps": 0}


def test_lora_is_added_once_in_float32_with_alpha_over_rank(adapter: Adapter) -> None:
    module, (down, up) = next(iter(adapter.pairs.items()))
    base = torch.randn(up.shape[0], down.shape[1]).bfloat16()
    for alpha, factor in ((None, 1.0), (float(RANK), 1.0), (6.0, 2.0)):
        found = replace(adapter, alpha=alpha).apply_to(f"{module}.weight", base)
        expected = base.double() + factor * (up.double() @ down.double())
        assert found.dtype == torch.bfloat16
        # Once: half a unit in the last place at most, and a little for float32.
        assert ((found.double() - expected).abs() <= expected.abs() * 2**-8 * 1.001 + 1e-7).all()


def test_a_latent_adapter_continues_the_latent_model(
    architecture: str, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    base = model_folders[architecture]
    learned = random_adapter(base)
    learned.save(tmp_path / "adapter", "# card\n")
    applied = liftkit.load_adapter(load(base), tmp_path / "adapter")
    assert type(applied.transformer).__name__ == learned.transformer
    assert not liftkit.open_flow(applied.transformer).is_pixel
    assert fuse(tmp_path / "adapter", str(base), tmp_path / "merged").proof is None
    merged = load(tmp_path / "merged")
    assert type(merged.vae) is type(applied.vae)
    torch.manual_seed(3)
    expected = image(architecture, merged)
    torch.manual_seed(3)
    torch.testing.assert_close(image(architecture, applied), expected, rtol=1e-4, atol=1e-4)


def test_half_precision_bases_take_adapters(
    architecture: str, saved: Path, model_folders: dict[str, Path], converted: dict[str, Path]
) -> None:
    exact = liftkit.load_adapter(load(model_folders[architecture]), saved).transformer
    half = liftkit.load_adapter(load(model_folders[architecture], dtype=torch.bfloat16), saved).transformer
    assert half.lift.basis.dtype == torch.float32
    for name, value in exact.state_dict().items():
        found = half.state_dict()[name].float()
        assert (found - value.float()).abs().max() <= 2**-7 * value.abs().max(), name


def test_demo_and_adapter_from_the_command_line(cli: Cli, tmp_path: Path) -> None:
    latent = Flux2Transformer2DModel.from_pretrained(TINY_KLEIN, subfolder="transformer")
    lift = Lift(torch.linalg.qr(torch.randn(192, 32))[0], 1.7, 8, 2)
    twin = liftkit.convert_transformer(latent, lift)
    shapes = {name: tensor.shape for name, tensor in twin.state_dict().items()}
    random_tensors(type(twin).__name__, shapes, lift, None, torch.bfloat16).save(tmp_path / "adapter", "# card\n")
    common = ("-p", "a red seven", "-n", 1, "--steps", 2, "--device", "cpu", "-o")
    for name, arguments in (("plain", ()), ("learned", ("--adapter", tmp_path / "adapter"))):
        code, _, err = cli("sample", "demo", *arguments, *common, tmp_path / f"{name}.png")
        assert code == 0, err
    assert list(Image.open(tmp_path / "plain.png").getdata()) != list(Image.open(tmp_path / "learned.png").getdata())
    pipeline = liftkit.load_adapter("demo", tmp_path / "adapter", device="cpu", dtype=torch.bfloat16)
    assert type(pipeline.transformer).__name__ == "AsymFlux2Transformer2DModel"
    assert pipeline.transformer.dtype == torch.bfloat16
    code, _, err = cli("sample", "demo", "--adapter", tmp_path, *common, tmp_path / "x.png")
    assert code == 2
    assert "no adapter" in err


def test_what_does_not_belong_together_is_refused_and_nothing_changes(
    model_folders: dict[str, Path], converted: dict[str, Path], tmp_path: Path
) -> None:
    learned = random_adapter(converted["flux2"])
    module, (down, up) = next(iter(learned.pairs.items()))

    def variant(**tensors: torch.Tensor | None) -> Adapter:
        renamed = {name.replace("__", "."): value for name, value in tensors.items()}
        kept = {name: value for name, value in {**learned.tensors, **renamed}.items() if value is not None}
        return replace(learned, tensors=kept)

    latent, pixel = load(model_folders["flux2"]), load(converted["flux2"])
    sd3 = load(model_folders["sd3"])
    wide = torch.zeros(2, 2)
    cases: list[tuple[Any, Adapter, str]] = [
        (sd3, learned, "made for AsymFlux2Transformer2DModel, the base has SD3Transformer2DModel"),
        (pixel, random_adapter(model_folders["flux2"]), "the base has AsymFlux2Transformer2DModel"),
        (pixel, replace(learned, lift=tiny.lift()), "converted with another lift"),
        (latent, replace(learned, lift=Lift(tiny.lift().basis[:, :8].contiguous(), 1.7, 4, 2)), "does not fit"),
        (latent, variant(proj_out__weight=wide), r"tensor 'proj_out.weight' is for \(2, 2\), the base has"),
        (latent, variant(new__weight=wide), "tensor 'new.weight' .* the base has none of that name"),
        (latent, replace(learned, tensors={f"nowhere{LORA_A}": down, f"nowhere{LORA_B}": up}), "'nowhere.weight'"),
    ]
    for pipeline, wrong, message in cases:
        before = {name: value.clone() for name, value in pipeline.transformer.state_dict().items()}
        vae, transformer = pipeline.vae, pipeline.transformer
        with pytest.raises(UsageError, match=message):
            liftkit.load_adapter(pipeline, wrong)
        assert (pipeline.vae, pipeline.transformer) == (vae, transformer)
        assert all(torch.equal(value, before[name]) for name, value in transformer.state_dict().items())
        if wrong.lift is not learned.lift:
            continue
        wrong.save(tmp_path / "wrong", "# card\n", overwrite=True)
        base = model_folders["sd3"] if pipeline is sd3 else model_folders["flux2"]
        for run in (fuse, keep):
            with pytest.raises(UsageError, match=message):
                run(tmp_path / "wrong", str(base), tmp_path / "out")
        assert not (tmp_path / "out").exists()
    for broken in ({f"{module}{LORA_B}": None}, {f"{module}{LORA_B}": torch.zeros(up.shape[0], RANK + 1)}):
        with pytest.raises(UsageError, match=r"adapter: tensor .*lora_"):
            variant(**broken)


def test_the_output_is_none_of_the_inputs(saved: Path, architecture: str, converted: dict[str, Path], cli: Cli) -> None:
    base = converted[architecture]
    for target in (saved, base, base.parent):
        for extra in ((), ("--keep-adapter",)):
            code, _, err = cli("import", saved, "--base", base, "--overwrite", "-o", target, *extra)
            assert code == 2
            assert "choose another output" in err
        assert cli("export", saved, "--format", "adapter", "--base", base, "--overwrite", "-o", target)[0] == 2
    assert is_adapter(saved)
    assert (base / "transformer").is_dir()


def test_a_record_that_lies_is_one_line(saved: Path) -> None:
    record = json.loads((saved / "liftkit.json").read_text())
    for key, value in (("alpha", "much"), ("transformer", ...)):
        spoiled = {name: each for name, each in {**record, key: value}.items() if each is not ...}
        (saved / "liftkit.json").write_text(json.dumps(spoiled))
        with pytest.raises(UsageError, match=key if value is ... else "liftkit.json"):
            Adapter.load(saved)


def test_models_become_adapters_of_ours(
    architecture: str,
    adapter: Adapter,
    merged: Path,
    model_folders: dict[str, Path],
    converted: dict[str, Path],
    cli: Cli,
    tmp_path: Path,
) -> None:
    """A conversion alone, and one with an adapter merged in: the adapter on the base is the model again."""
    base, common = model_folders[architecture], ("--format", "adapter", "-o")
    for model, more in ((converted[architecture], ()), (merged, ("--base", base))):
        target = tmp_path / f"{model.name}-adapter"
        code, out, err = cli("export", model, *more, *common, target)
        assert code == 0, err
        assert f"LoRA on {len(adapter.pairs) if model == merged else 0} modules" in out
        whole, applied = load(model).transformer, liftkit.load_adapter(load(base), target).transformer
        for name, value in whole.state_dict().items():
            assert (applied.state_dict()[name] - value).abs().max() <= 1e-5 * value.abs().max(), name


def test_a_conversion_is_saved_as_an_adapter(
    architecture: str, cli: Cli, model_folders: dict[str, Path], converted: dict[str, Path], tmp_path: Path
) -> None:
    base, whole = model_folders[architecture], converted[architecture]
    arguments = ("convert", base, "--lift", whole / "lift.safetensors", "--save", "adapter", "-o", tmp_path / "adapter")
    code, out, err = cli(*arguments)
    assert code == 0, err
    assert f"liftkit sample {base} --adapter {tmp_path / 'adapter'}" in out
    assert "on the projections" in out
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "README.md", "adapter.safetensors", "lift.safetensors", "liftkit.json"
    }  # fmt: skip
    applied, expected = liftkit.load_adapter(load(base), tmp_path / "adapter").transformer, load(whole).transformer
    assert all(torch.equal(value, applied.state_dict()[name]) for name, value in expected.state_dict().items())
    record = json.loads((tmp_path / "adapter" / "liftkit.json").read_text())
    assert record["proof"]["exact"] < 1e-3
    assert record["base"] == architecture
    assert cli(*arguments)[0] == 2
    code, out, err = cli(*arguments, "--overwrite", "--dtype", "bfloat16", "--dry-run")
    assert "B for" in out
    code, out, err = cli(*arguments, "--overwrite", "--dtype", "bfloat16")
    assert code == 0, err
    assert {tensor.dtype for tensor in Adapter.load(tmp_path / "adapter").tensors.values()} == {torch.bfloat16}
