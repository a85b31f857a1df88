"""The flow loss by band of the spectrum and noise level, and finetunes that begin with the projections."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from liftkit.finetune.bands import BandError, dct_matrix
from liftkit.finetune.objective import flow_loss
from liftkit.finetune.run import finetune
from liftkit.finetune.stages import trunk_of
from liftkit.finetune.state import checkpoints
from tests.test_going_on import assert_same_run
from tests.training import Watch, rows

QUICK = ("steps=3", "previews.every=0", "validation.every=0", "objective.adversarial=0")
SIGMA = torch.tensor([0.0, 0.1, 0.25, 0.5, 1.0])


def wave(cycles: float, side: int = 32) -> torch.Tensor:
    """A wave of so many half cycles along the rows of images (5, 3, side, side)."""
    row = dct_matrix(side)[int(2 * cycles)]
    return row.expand(5, 3, side, side).clone()


def test_the_transform_keeps_energies_and_knows_its_waves() -> None:
    matrix = dct_matrix(24)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(24), rtol=0, atol=1e-6)
    assert (matrix[0] - matrix[0, 0]).abs().max() < 1e-7


def test_bands_count_alike_at_high_noise_and_fine_ones_more_at_low() -> None:
    bands = BandError(power=1.0, wavelength=16.0, below=0.5)
    for error, sign in ((wave(0.5), -1), (wave(14), 1)):
        plain, weighted = error.square().mean((1, 2, 3)), bands(error, SIGMA)
        torch.testing.assert_close(weighted[3:], plain[3:])
        ratio = (weighted / plain).log() * sign
        assert (ratio[:3] > 0.1).all()
        assert ratio[0] > ratio[1] > ratio[2]


def test_errors_of_all_bands_count_as_much_as_without_and_a_spectrum_of_photographs_is_flat() -> None:
    bands = BandError(power=1.0, wavelength=16.0, below=0.5)
    noise = torch.randn(5, 3, 64, 48, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(bands(noise, SIGMA), noise.square().mean((1, 2, 3)), rtol=0.03, atol=0)
    weights = bands.weights(64, 48, torch.zeros(1))[0]
    squares = (torch.arange(64) / 128.0).square()[:, None] + (torch.arange(48) / 96.0).square()
    flat = weights / (1.0 / 256.0 + squares)
    torch.testing.assert_close(flat, flat[:1, :1].expand_as(flat), rtol=1e-4, atol=0)


def test_a_power_of_zero_is_the_loss_without_bands() -> None:
    x0, noise = torch.randn(2, 5, 3, 16, 16)
    guess = torch.randn(5, 3, 16, 16, requires_grad=True)
    plain, _ = flow_loss(lambda x, s: guess, x0, SIGMA, noise)
    same, _ = flow_loss(lambda x, s: guess, x0, SIGMA, noise, bands=BandError(0.0, 16.0, 0.5))
    other, _ = flow_loss(lambda x, s: guess, x0, SIGMA, noise, bands=BandError(1.0, 16.0, 0.9))
    torch.testing.assert_close(same, plain)
    assert (other - plain).abs() > 1e-4 * plain
    assert torch.autograd.grad(other, guess)[0].isfinite().all()


@pytest.mark.parametrize("loss", ["asymflow", "flow"])
def test_a_run_uses_its_bands(loss: str, make: Any) -> None:
    choices = {"plain": (), "same": ("objective.bands={power: 0}",), "other": ("objective.bands={below: 0.9}",)}
    found = {
        name: [
            row["loss"]
            for row in rows(finetune(make(name, *QUICK, f"objective.loss={loss}", *more)).trainer.folder.path)
        ]
        for name, more in choices.items()
    }
    assert found["same"] == pytest.approx(found["plain"], rel=1e-4)
    assert found["other"][0] != pytest.approx(found["plain"][0], rel=1e-3)


def learned(folder: Path, stem: str = "parameters") -> dict[str, torch.Tensor]:
    return load_file(checkpoints(folder / "checkpoints")[-1][1] / f"{stem}.safetensors")


@pytest.mark.parametrize("mode", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_the_trunk_is_held_and_then_learns_more_slowly(mode: str, make: Any) -> None:
    common = (
        *QUICK,
        f"trainable.mode={mode}",
        "optimizer.name=adamw",
        "trainable.head={channels: 8}",
        "trainable.dropout=0",
    )
    common = (*common, "ema.enabled=false", "optimizer.warmup=0")
    before = finetune(make("before", *common, "steps=1", "optimizer.learning_rate=1e-12")).trainer
    held = finetune(make("held", *common, "optimizer.trunk={start: 3}")).trainer
    trunk = trunk_of(held.trainee.spec, held.learner.parameters).keys()
    first, after = learned(before.folder.path), learned(held.folder.path)
    assert trunk
    assert {name.partition(".")[0] for name in after.keys() - trunk} == {
        "x_embedder",
        "proj_out",
        "norm_out",
        "detail_head",
    }
    for name, value in after.items():
        assert torch.allclose(value, first[name], rtol=0, atol=1e-9) == (name in trunk), name
    assert not [name for name in learned(held.folder.path, "optimizer") if name.rpartition("/")[0] in trunk]
    # A step of AdamW's first is its learning rate.
    free = learned(finetune(make("free", *common, "steps=1", "optimizer.trunk={factor: 0.01}")).trainer.folder.path)
    most = {
        inside: max(float((free[name] - first[name]).abs().max()) for name in free if (name in trunk) == inside)
        for inside in (True, False)
    }
    assert most[True] == pytest.approx(2e-5, rel=0.05)
    assert most[False] == pytest.approx(6e-3, rel=0.05)


def test_without_stages_nothing_changes_and_with_them_a_run_goes_on_to_the_last_bit(make: Any, tmp_path: Path) -> None:
    plain, same = (
        learned(finetune(make(name, *QUICK, *more)).trainer.folder.path)
        for name, more in (("plain", ()), ("same", ("optimizer.trunk={start: 0, factor: 1.0}",)))
    )
    assert all(torch.equal(value, same[name]) for name, value in plain.items())
    staged = ("optimizer.trunk={start: 3}", "objective.bands={}")
    finetune(make("whole", *staged))
    recipe = make("parts", *staged)
    finetune(recipe, observer=Watch(lambda step: (recipe.output / "stop").touch() if step == 2 else None))
    finetune(recipe, resume="latest")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
