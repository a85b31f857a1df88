"""Latent LoRAs on pixel models: Theorem 1 holds with them, however their keys are spelt."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import liftkit
from liftkit.conversion.tied import TiedRun
from liftkit.errors import UsageError
from liftkit.lift import Lift
from liftkit.models.registry import architecture as spec_of
from tests import tiny
from tests.converting import failed
from tests.test_pipelines import load

Cli = Callable[..., tuple[int, str, str]]
NAMES = {"flux2": "Flux2Transformer2DModel", "sd3": "SD3Transformer2DModel"}
STYLE = {"flux2": "transformer_blocks.0.attn.to_q", "sd3": "transformer_blocks.1.attn.to_q"}


def latent_lora(name: str, rank: int = 2, projections: bool = True) -> dict[str, Tensor]:
    """A random LoRA of the tiny model, on a block and on the projections, in diffusers' keys."""
    model, spec = tiny.TRANSFORMERS[NAMES[name]](), spec_of(NAMES[name])
    paths = [STYLE[name], *([projection.path for projection, _ in spec.projections] if projections else [])]
    generator, state = torch.Generator().manual_seed(2), {}
    for path in paths:
        module = model.get_submodule(path)
        rows, columns, *kernel = module.weight.shape
        state[f"transformer.{path}.lora_A.weight"] = torch.randn(rank, columns, *kernel, generator=generator) * 0.3
        state[f"transformer.{path}.lora_B.weight"] = (
            torch.randn(rows, rank, *(1,) * len(kernel), generator=generator) * 0.3
        )
    return state


def attach(model: nn.Module, state: dict[str, Tensor]) -> Any:
    """By diffusers and peft, as ``load_lora_weights`` does it."""
    model.load_lora_adapter(state, prefix="transformer")  # type: ignore[operator]
    return model.double().eval()


def tied(name: str, lift: Lift, latent: Any, pixel: Any) -> float:
    run = TiedRun(spec_of(NAMES[name]), dict(latent.config), lift, 4, 0, dtype=torch.float64)
    run.conditioning = {
        key: value.double() if value.is_floating_point() else value for key, value in run.conditioning.items()
    }
    return run.deviation(liftkit.open_flow(pixel), run.sample_latent(liftkit.open_flow(latent)))


def test_theorem_1_holds_with_a_lora_on_the_projections(architecture: str) -> None:
    lift, state = tiny.lift(scale=1.0), latent_lora(architecture)
    latent, source = (tiny.TRANSFORMERS[NAMES[architecture]]().double() for _ in range(2))
    doubled = {key: tensor.double() for key, tensor in state.items()}
    lifted = liftkit.lift_lora(doubled, spec_of(NAMES[architecture]), lift)
    pixel = liftkit.convert_transformer(source, lift)
    plain = tied(architecture, lift, latent, pixel)
    attach(latent, doubled)
    assert tied(architecture, lift, latent, pixel) > 1e-2
    attach(pixel, lifted)
    # The stock classes take the sine of their time in float32, which is the same on both sides where s = 1.
    assert plain < 1e-9
    assert tied(architecture, lift, latent, pixel) < 1e-9


def test_only_what_touches_a_projection_changes(architecture: str) -> None:
    lift, state = tiny.lift(), latent_lora(architecture)
    spec = spec_of(NAMES[architecture])
    lifted = liftkit.lift_lora(state, spec, lift)
    changed = {key for key in state if lifted[key] is not state[key]}
    assert changed == {
        f"transformer.{spec.inputs[0].path}.lora_A.weight",
        f"transformer.{spec.outputs[0].path}.lora_B.weight",
    }
    pixel = liftkit.convert_transformer(tiny.TRANSFORMERS[NAMES[architecture]](), lift)
    for projection, _ in spec.projections:
        weight = pixel.get_submodule(projection.path).weight
        assert lifted[f"transformer.{projection.path}.lora_A.weight"].shape[1:] == weight.shape[1:]
        assert lifted[f"transformer.{projection.path}.lora_B.weight"].shape[0] == weight.shape[0]
    assert all(tensor.dtype == torch.float32 for tensor in lifted.values())


def test_a_file_is_lifted_and_the_stock_pipeline_loads_it(
    architecture: str, cli: Cli, converted: dict[str, Path], tmp_path: Path
) -> None:
    state, spec = latent_lora(architecture), spec_of(NAMES[architecture])
    save_file(state, tmp_path / "style.safetensors", {"format": "pt", "author": "someone"})
    base, output = converted[architecture], tmp_path / "lifted.safetensors"
    code, out, err = cli("import", tmp_path / "style.safetensors", "--base", base, "-o", output)
    assert code == 0, err
    assert "on 3 modules" in out
    assert all(projection.path in out for projection, _ in spec.projections)
    pipeline = load(base)
    before = pipeline.transformer.state_dict()
    weight = {name: before[f"{name}.weight"].clone() for name in (spec.outputs[0].path, STYLE[architecture])}
    pipeline.load_lora_weights(output)
    pipeline.fuse_lora()
    lift = Lift.load(base / "lift.safetensors")
    expected = liftkit.lift_lora(state, spec, lift)
    for path, value in weight.items():
        down, up = (expected[f"transformer.{path}.lora_{half}.weight"] for half in "AB")
        fused = pipeline.transformer.get_submodule(path).weight
        assert torch.allclose(fused, value + up @ down, atol=1e-5)
    failed(cli("import", tmp_path / "style.safetensors", "--base", base, "-o", output), "exists already")


def test_a_style_without_projections_applies_as_it_is(
    architecture: str, cli: Cli, converted: dict[str, Path], tmp_path: Path
) -> None:
    state = latent_lora(architecture, projections=False)
    save_file(state, tmp_path / "style.safetensors")
    pipeline = load(converted[architecture])
    pipeline.load_lora_weights(tmp_path / "style.safetensors")
    code, out, err = cli(
        "import", tmp_path / "style.safetensors", "--base", converted[architecture], "-o", tmp_path / "out.safetensors"
    )
    assert code == 0, err
    assert "nothing: it touches no projection" in out
    same = load_file(tmp_path / "out.safetensors")
    assert state.keys() == same.keys()
    assert all(torch.equal(tensor, same[key]) for key, tensor in state.items())


def test_a_lora_of_text_encoders_stays_beside_it(cli: Cli, converted: dict[str, Path], tmp_path: Path) -> None:
    module = "text_encoder.text_model.layers.0.q_proj"
    text = {f"{module}.lora_A.weight": torch.ones(2, 3), f"{module}.lora_B.weight": torch.ones(3, 2)}
    save_file({**latent_lora("sd3"), **text}, tmp_path / "style.safetensors")
    base, output = converted["sd3"], tmp_path / "out.safetensors"
    code, out, err = cli("import", tmp_path / "style.safetensors", "--base", base, "-o", output)
    assert code == 0, err
    assert "on 3 modules" in out
    found = load_file(output)
    assert all(torch.equal(found[key], tensor) for key, tensor in text.items())


@pytest.mark.parametrize("spelling", ["bare", "peft", "default", "down-up", "bfl"])
def test_keys_may_be_spelt_otherwise(spelling: str, cli: Cli, converted: dict[str, Path], tmp_path: Path) -> None:
    state = latent_lora("flux2")
    respelt = {
        "bare": lambda key: key.removeprefix("transformer."),
        "peft": lambda key: key.replace("transformer.", "base_model.model.", 1),
        "default": lambda key: key.replace(".weight", ".default.weight"),
        "down-up": lambda key: key.replace("lora_A", "lora_down").replace("lora_B", "lora_up"),
        "bfl": lambda key: (
            key.replace("transformer.", "diffusion_model.", 1)
            .replace("x_embedder", "img_in")
            .replace("proj_out", "final_layer.linear")
            .replace("transformer_blocks.0.attn.to_q", "single_blocks.0.linear2")
        ),
    }[spelling]
    if spelling == "bfl":
        shape = (2, 4 * 32)
        state["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"] = torch.randn(shape)
    save_file({respelt(key): tensor for key, tensor in state.items()}, tmp_path / "style.safetensors")
    base, output = converted["flux2"], tmp_path / "out.safetensors"
    code, _, err = cli("import", tmp_path / "style.safetensors", "--base", base, "-o", output)
    assert code == 0, err
    found = load_file(output)
    lifted = liftkit.lift_lora(state, spec_of(NAMES["flux2"]), Lift.load(base / "lift.safetensors"))
    assert len(found) == len(lifted)
    for key, tensor in found.items():
        assert torch.equal(tensor, lifted[key.replace("single_transformer_blocks.0.attn.to_out", STYLE["flux2"])])
    load(base).load_lora_weights(output)


def test_alpha_goes_into_b(cli: Cli, converted: dict[str, Path], tmp_path: Path) -> None:
    state = latent_lora("flux2")
    alphas = {key.replace("lora_A.weight", "alpha"): torch.tensor(1.0) for key in state if "lora_A" in key}
    save_file({**state, **alphas}, tmp_path / "style.safetensors")
    base, output = converted["flux2"], tmp_path / "out.safetensors"
    code, _, err = cli("import", tmp_path / "style.safetensors", "--base", base, "-o", output)
    assert code == 0, err
    found = load_file(output)
    key = f"transformer.{STYLE['flux2']}.lora_B.weight"
    assert torch.equal(found[key], state[key] / 2)
    assert not any("alpha" in key for key in found)
    load(base).load_lora_weights(output)


def test_what_is_no_lora_of_the_model_is_named(
    cli: Cli, model_folders: dict[str, Path], converted: dict[str, Path], tmp_path: Path
) -> None:
    state, base = latent_lora("flux2"), converted["flux2"]
    lift = Lift.load(base / "lift.safetensors")
    first, last = "transformer.x_embedder.lora_A.weight", "transformer.proj_out.lora_B.weight"
    cases: list[tuple[dict[str, Tensor | None], tuple[str, ...]]] = [
        ({first: torch.zeros(2, lift.dim)}, ("transformer.x_embedder", "of pixel tokens already")),
        ({last: torch.zeros(12, 2)}, ("transformer.proj_out", "expected to give 16 numbers", "found 12")),
        ({first: None}, ("has no lora_A.weight beside it",)),
        ({f"transformer.{STYLE['flux2']}.lora_B.weight": torch.zeros(3, 2)}, ("to give 32 numbers, found 3",)),
        ({"transformer.nowhere.lora_A.weight": torch.zeros(2, 2)}, ("nowhere",)),
        ({"transformer.proj_out.lora_magnitude_vector": torch.ones(16)}, ("DoRA on 1 of 3 modules",)),
        ({first: torch.full((2, 16), float("nan"))}, ("transformer.x_embedder", "NaN")),
    ]
    path, output = tmp_path / "style.safetensors", tmp_path / "out.safetensors"
    for changes, expected in cases:
        save_file({key: tensor for key, tensor in {**state, **changes}.items() if tensor is not None}, path)
        failed(cli("import", path, "--base", base, "-o", output), "style.safetensors", *expected)
    save_file(state, path)
    failed(cli("import", path, "--base", model_folders["flux2"], "-o", output), "apply to that as they are")
    failed(
        cli("import", path, "--base", converted["sd3"], "-o", output), "style.safetensors", "not in this transformer"
    )
    failed(cli("import", path, "-o", output), "is a LoRA", "--base FOLDER")
    failed(cli("import", path, "--base", base, "-o", tmp_path / "out.bin"), "ends in .safetensors")
    failed(cli("import", path, "--base", base, "--keep-adapter", "-o", output), "--keep-adapter: means nothing")
    (tmp_path / "style.ckpt").write_bytes(b"\x80\x02}q\x00.")
    failed(cli("import", tmp_path / "style.ckpt", "--base", base, "-o", output), "a pickle")
    assert not output.exists()


def test_a_lora_of_pixels_is_not_lifted_twice() -> None:
    lift, spec = tiny.lift(), spec_of(NAMES["flux2"])
    lifted = liftkit.lift_lora(latent_lora("flux2"), spec, lift)
    with pytest.raises(UsageError, match="already"):
        liftkit.lift_lora(lifted, spec, lift)
