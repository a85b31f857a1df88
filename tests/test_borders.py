"""The loss of steps across borders of patches, and finetunes of the detail head alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from liftkit.errors import UsageError
from liftkit.finetune.borders import border_loss
from liftkit.finetune.recipe_file import load_recipe
from liftkit.finetune.run import finetune
from tests.test_bands_and_stages import QUICK, learned
from tests.training import rows


def test_steps_across_borders_count_and_what_is_inside_patches_does_not() -> None:
    tiles = torch.randn(2, 3, 2, 3, generator=torch.Generator().manual_seed(0))
    error = tiles.repeat_interleave(4, -1).repeat_interleave(4, -2)
    across, down = tiles.diff(dim=-1).square(), tiles.diff(dim=-2).square()
    # Each step between tiles is one of four pixels.
    wanted = (across.sum() + down.sum()) / (across.numel() + down.numel())
    torch.testing.assert_close(border_loss(error, 4), wanted)
    inside = torch.zeros(2, 3, 8, 12)
    inside[..., 1:3, 1:3] = 1.0
    assert border_loss(inside, 4) == 0
    assert border_loss(torch.randn(2, 3, 4, 4), 4) == 0


def test_rectangular_images_and_steps_along_one_axis() -> None:
    error = torch.zeros(1, 1, 8, 4)
    error[:, :, 4:] = 3.0
    # One border of four pairs, all of them 3 apart.
    assert border_loss(error, 4) == pytest.approx(9.0)


@pytest.mark.parametrize("loss", ["flow", "asymflow"])
def test_the_head_alone_learns_and_the_loss_holds_its_term(loss: str, make: Any) -> None:
    alone = ("trainable.mode=head", "trainable.head={channels: 8}", "optimizer.multipliers={}", "trainable.open=0")
    common = (*QUICK, f"objective.loss={loss}", *alone)
    runs = {
        name: finetune(make(name, *common, *more)).trainer
        for name, more in {"plain": (), "borders": ("objective.borders=2",)}.items()
    }
    for trainer in runs.values():
        assert {name.partition(".")[0] for name in learned(trainer.folder.path)} == {"detail_head"}
    plain, borders = (rows(trainer.folder.path)[0] for trainer in runs.values())
    weight = runs["borders"].recipe.objective.weight
    assert borders["loss"] == pytest.approx(plain["loss"] + weight * 2 * borders["borders"], rel=1e-4)
    assert borders["borders"] > 0
    assert "borders" not in plain


def test_a_model_without_a_head_has_none_to_train_alone(make: Any) -> None:
    with pytest.raises(UsageError, match=r"trainable\.mode: head: the model has none"):
        finetune(make("none", *QUICK, "trainable.mode=head", "optimizer.multipliers={}", "trainable.open=0"))


def test_borders_of_latents_are_refused() -> None:
    with pytest.raises(UsageError, match=r"objective\.borders"):
        load_recipe("tiny-klein", ["space=latent", "trainable.open=0", "objective.loss=flow", "objective.borders=1"])
