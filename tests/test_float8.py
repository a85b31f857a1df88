"""The frozen reference's products in float8."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from liftkit.errors import UsageError
from liftkit.finetune.float8 import LARGEST, Float8Linear, check_float8, give_float8, rounded
from liftkit.finetune.run import finetune, make_accelerator, prepare
from liftkit.finetune.run_folder import RunFolder
from liftkit.progress import Silent
from tests.recipes import losses, recipes_in, trained

FLOAT8 = "objective.reference_precision=float8"


def multiplies() -> bool:
    """Older versions of torch have no products in float8 on a processor, and say so."""
    try:
        check_float8(torch.device("cpu"))
    except UsageError as error:
        assert "install torch >= 2.7" in str(error)
        return False
    return True


needs_products = pytest.mark.skipif(not multiplies(), reason="this torch has no products in float8 on a processor")


@pytest.fixture(scope="module")
def make(pixel_klein: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return recipes_in(tmp_path_factory.mktemp("float8"), pixel_klein)


@pytest.mark.parametrize("size", [1e-4, 3e-3, 1.0, 30.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_are_rounded_to_three_bits_of_mantissa(dtype: torch.dtype, size: float) -> None:
    values = (torch.randn(64, 48, generator=torch.Generator().manual_seed(0)) * size).to(dtype)
    eight, scale = rounded(values)
    found = eight.float() * scale
    # Float16 has no factor that brings numbers below 0.03 so far up.
    assert float(eight.float().abs().max()) == LARGEST or (dtype == torch.float16 and size < 0.01)
    assert torch.isfinite(found).all()
    # Half a step of the mantissa, and that of the dtype itself; or half of the smallest number there is.
    off = (found - values.float()).abs()
    assert bool((off <= values.float().abs() * (2**-4 + 2**-7) + scale * 2**-10).all())


@pytest.mark.parametrize("size", [1.0, 1e4])
def test_the_scale_is_that_which_numbers_were_divided_by(size: float) -> None:
    """Its reciprocal is rounded in bfloat16: else all numbers are off to the same side, here by more than 2e-3."""
    values = (torch.randn(512, 512, generator=torch.Generator().manual_seed(0)) * size).bfloat16()
    slopes = []
    for numbers in (values, values.float()):
        eight, scale = rounded(numbers)
        slopes.append(float((eight.double() * scale * values).sum() / values.double().square().sum()))
    assert slopes[0] == pytest.approx(slopes[1], abs=1e-3)


def test_zeros_stay_zeros() -> None:
    eight, scale = rounded(torch.zeros(4, 16))
    assert float(scale) > 0
    assert not eight.float().any()


class Blocks(torch.nn.Module):
    """As a transformer of diffusers names its blocks."""

    _repeated_blocks = ("Sequential",)

    def __init__(self, *layers: torch.nn.Module) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList([torch.nn.Sequential(*layers)])


@needs_products
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_tokens_are_near_the_exact_ones_and_modulations_are_exact(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer, odd = torch.nn.Linear(96, 64), torch.nn.Linear(96, 10)
    network = Blocks(layer, odd).to(dtype).requires_grad_(False)
    states = torch.randn(2, 7, 96).to(dtype)
    before = layer(states)
    assert give_float8(network) == [layer]
    assert type(odd) is torch.nn.Linear
    assert torch.equal(layer(states), before)
    layer.in_float8 = True
    after = layer(states)
    assert after.dtype == dtype
    assert after.shape == before.shape
    assert 0.005 < float((after - before).float().norm() / before.float().norm()) < 0.05
    layer.in_float8 = False
    whole = layer(states[:, 0])
    layer.in_float8 = True
    assert torch.equal(layer(states[:, 0]), whole)
    assert set(network.state_dict()) == {f"blocks.0.{n}.{kind}" for n in (0, 1) for kind in ("weight", "bias")}


def test_what_learns_or_has_no_suitable_shape_is_no_matter_of_float8() -> None:
    with pytest.raises(UsageError, match="no frozen matrix whose sides are multiples of 16"):
        give_float8(Blocks(torch.nn.Linear(32, 32), torch.nn.Linear(30, 32).requires_grad_(False)))


@needs_products
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_only_the_reference_is_in_float8(make: Any, mode: str) -> None:
    more = ("trainable.mode=full", "save=model") if mode == "full" else ("precision=bf16",)
    exact, eight = (
        prepare(make(f"only-{mode}-{name}", *more, *keys), RunFolder(make("only").output), Silent())
        for name, keys in (("same", ()), ("float8", (FLOAT8,)))
    )
    assert any(isinstance(each, Float8Linear) for each in eight.trainee.network.modules())
    batch = exact.ahead(0, exact.data.batch(0)).wait()
    velocities = []
    for trainer in (exact, eight):
        objective = trainer.learner.objective
        x0 = objective.state(batch.batch)
        x_t = torch.lerp(x0, batch.noise, batch.sigma.view(-1, 1, 1, 1))
        prompts = batch.batch.prompts
        with torch.no_grad():
            ours = [objective.student.velocity(x_t, batch.sigma, **prompts) for _ in range(2)]
        theirs = objective.reference.velocity(x_t, batch.sigma, **prompts)
        assert torch.equal(*ours)
        velocities.append((ours[0], theirs))
    (student, reference), (same, other) = velocities
    assert torch.equal(student, same)
    assert 1e-4 < float((reference - other).norm() / reference.norm()) < 0.05


@needs_products
def test_a_resumed_run_equals_one_that_was_not(make: Any) -> None:
    quick = (FLOAT8, "precision=bf16", "steps=4", "checkpoints.every=2")
    whole = trained(make("whole", *quick))
    recipe = make("parts", *quick)
    finetune(recipe)
    finetune(recipe, resume=str(recipe.output / "checkpoints" / "step-0000002"))
    assert losses(recipe.output) == whole
    names = load_file(recipe.output / "adapter" / "adapter.safetensors")
    assert not any("float8" in name for name in names)


@pytest.mark.parametrize("choice", [FLOAT8, "base.quantize=int8", "base.offload=blocks"])
def test_what_nothing_shares_out_among_processes_is_for_one(
    make: Any, monkeypatch: pytest.MonkeyPatch, choice: str
) -> None:
    monkeypatch.setattr("accelerate.Accelerator.num_processes", property(lambda self: 2))
    recipe = make("two", choice, "gradient_checkpointing=true")
    with pytest.raises(UsageError, match=f"{choice.replace('=', ': ')}: one process only, here are 2; set it to"):
        make_accelerator(recipe, RunFolder(recipe.output))


def test_a_device_without_float8_is_named() -> None:
    with pytest.raises(UsageError, match="reference_precision: float8: mps has no products in float8"):
        check_float8(torch.device("mps"))


@needs_products
@pytest.mark.slow
def test_fifty_steps_have_the_losses_of_the_exact_reference(make: Any) -> None:
    long = ("steps=50", "checkpoints.every=0", "precision=bf16")
    exact, eight = (trained(make(f"fifty-{len(keys)}", *long, *keys)) for keys in ((), (FLOAT8,)))
    assert exact != eight
    assert eight == pytest.approx(exact, rel=0.02)
    assert sum(eight) == pytest.approx(sum(exact), rel=0.002)
