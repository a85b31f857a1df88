"""What has to hold on a GPU; skipped without one. ``--gpu-device cpu`` tries the tests themselves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import liftkit
from liftkit.conversion.tied import TiedRun
from liftkit.finetune.network import compile_blocks
from liftkit.finetune.recipe_file import load_recipe
from liftkit.finetune.run import finetune
from liftkit.finetune.state import checkpoints
from liftkit.models.detail_head import add_head
from tests import tiny
from tests.training import TEXT, rows

pytestmark = pytest.mark.gpu
FINETUNE = (
    "optimizer.name=adamw",
    "previews.every=0",
    "validation.every=0",
    "trainable.dropout=0",
    "objective.adversarial=0",
)


@pytest.fixture
def full_float32() -> Iterator[None]:
    """Products of float32 numbers without TF32, whose 10 bits would hide everything below 1e-3."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def twins(name: str, device: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    latent = tiny.TRANSFORMERS[name]().to(device, dtype)
    return latent, liftkit.convert_transformer(latent, tiny.lift())


def velocity(model: Any, device: str) -> Tensor:
    flow = liftkit.open_flow(model)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, flow.channels, 2 * flow.token_side, 3 * flow.token_side, generator=generator).to(device)
    conditioning = flow.architecture.conditioning(model.config, 2, generator)
    given = {name: value.to(device) for name, value in conditioning.items()}
    with torch.no_grad():
        return flow.velocity(x, torch.tensor([0.2, 0.6], device=device), **given).float().cpu()


@pytest.mark.parametrize("name", sorted(tiny.TRANSFORMERS))
@pytest.mark.usefixtures("full_float32")
def test_theorem_1_in_float32(name: str, gpu: str) -> None:
    latent, twin = twins(name, gpu)
    run = TiedRun(twin.architecture, dict(latent.config), tiny.lift(), 6, 0, device=gpu)
    assert run.deviation(liftkit.open_flow(twin), run.sample_latent(liftkit.open_flow(latent))) < 1e-4


@pytest.mark.usefixtures("full_float32")
def test_a_conversion_is_proved_there(
    architecture: str, gpu: str, model_folders: dict[str, Path], image_folder: Path, tmp_path: Path
) -> None:
    done = liftkit.convert(str(model_folders[architecture]), tmp_path / "out", images=str(image_folder), device=gpu)
    assert done.proof.exact < 1e-4


@pytest.mark.parametrize("name", sorted(tiny.TRANSFORMERS))
def test_the_recovery_beside_a_bfloat16_network_is_that_of_float64(
    name: str, gpu: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the network is rounded to, what follows it is not: not even under autocast."""
    _, twin = twins(name, gpu)
    head = twin.lift
    twin = twin.to(torch.bfloat16)
    seen: list[tuple[Tensor, ...]] = []
    original = type(head).forward

    def spy(self: Any, u_cal: Tensor, x_t: Tensor, sigma: Tensor, scale: float) -> Tensor:
        found = original(self, u_cal, x_t, sigma, scale)
        seen.append((u_cal, x_t, sigma, found))
        return found

    monkeypatch.setattr(type(head), "forward", spy)
    with torch.autocast(gpu, torch.bfloat16):
        velocity(twin, gpu)
    ((u_cal, x_t, sigma, found),) = seen
    assert (u_cal.dtype, x_t.dtype, found.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    exact = [each.double().cpu() for each in (u_cal, x_t, sigma)]
    expected = liftkit.recover_velocity(*exact, twin.lift.basis.double().cpu(), twin.config.lift_scale)
    assert (found.double().cpu() - expected).abs().max() / expected.abs().max() < 1e-5


@pytest.mark.parametrize("name", sorted(tiny.TRANSFORMERS))
@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_reduced_precision_stays_close_to_float32(name: str, dtype: torch.dtype, limit: float, gpu: str) -> None:
    _, twin = twins(name, gpu)
    exact = velocity(twin, gpu)
    found = velocity(twin.to(dtype), gpu)
    assert twin.lift.basis.dtype == torch.float32
    assert (found - exact).norm() / exact.norm() < limit


@pytest.mark.parametrize("name", sorted(tiny.TRANSFORMERS))
@pytest.mark.usefixtures("full_float32")
@pytest.mark.filterwarnings("default")
def test_a_compiled_twin_says_the_same(name: str, gpu: str) -> None:
    _, twin = twins(name, gpu)
    head = add_head(twin, 8, 3)
    torch.nn.init.normal_(head.layers[-1].weight, std=0.3)
    expected = velocity(twin, gpu)
    torch.compiler.reset()
    # On a CPU inductor would need a compiler and minutes; what is compiled is the same.
    compile_blocks(twin, **({} if gpu == "cuda" else {"backend": "aot_eager"}))
    torch.testing.assert_close(velocity(twin, gpu), expected, rtol=1e-4, atol=1e-4)


@pytest.fixture
def make(pixel_klein: Path, tmp_path: Path) -> Any:
    def recipe(name: str, *overrides: str) -> Any:
        file = tmp_path / f"{name}.yaml"
        given = {"model": pixel_klein, "output": tmp_path / name, "cache": tmp_path / "cache", "threads": 1}
        file.write_text(TEXT.format(**given))
        return load_recipe(file, [*FINETUNE, *overrides])

    return recipe


def test_a_resumed_run_ends_where_one_that_was_not_does(gpu: str, make: Any, tmp_path: Path) -> None:
    """Within tolerance: a GPU may add in another order each time."""
    finetune(make("whole"))
    parts = make("parts")
    finetune(parts)
    finetune(parts, resume=str(parts.output / "checkpoints" / "step-0000003"))
    for one, other in zip(rows(tmp_path / "whole"), rows(tmp_path / "parts"), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-3)
    first, second = (checkpoints(tmp_path / name / "checkpoints")[-1][1] for name in ("whole", "parts"))
    found, expected = (load_file(path / "average.safetensors") for path in (second, first))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-2, atol=1e-3, msg=name)


@pytest.mark.parametrize(("precision", "limit"), [("bf16", 0.05), ("fp16", 0.01)])
def test_mixed_precision_has_the_losses_of_float32(precision: str, limit: float, gpu: str, make: Any) -> None:
    if precision == "fp16" and gpu == "cpu":
        pytest.skip("accelerate has no fp16 on a CPU")
    quick = ("steps=2",)
    exact = rows(finetune(make("exact", *quick)).trainer.folder.path)
    found = rows(finetune(make("found", *quick, f"precision={precision}")).trainer.folder.path)
    for one, other in zip(exact, found, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=limit)
