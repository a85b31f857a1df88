"""Adapters learned upon folders that had one merged in, and adapters in half precision."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import liftkit
from liftkit.checkpoint.model import find_model
from liftkit.errors import UsageError
from liftkit.finetune.result import card
from liftkit.formats.adapters import fuse
from liftkit.formats.generations import MERGED, for_latent_base, history_of
from liftkit.models.adapted import check_needs
from liftkit.models.adapter import Adapter, compact
from tests.adapters import random_adapter
from tests.test_pipelines import load


def first_and_second(pixel: Path, tmp_path: Path) -> tuple[Path, Adapter]:
    """A folder with a random adapter merged in, and another adapter learned upon it that trains less in full."""
    first = random_adapter(pixel, alpha=6.0)
    first.save(tmp_path / "first", "# card\n")
    folder = fuse(tmp_path / "first", str(pixel), tmp_path / "merged").output
    second = random_adapter(pixel, alpha=1.5)
    kept = {
        name: 0.5 * tensor for name, tensor in second.tensors.items() if not name.startswith(("x_embedder", "norm_out"))
    }
    return folder, replace(second, tensors=kept)


@pytest.fixture(scope="module")
def pixel(converted: dict[str, Path]) -> Path:
    return converted["flux2"]


def test_stacked_on_the_latent_base_is_what_was_learned_upon_the_folder(
    pixel: Path, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    folder, second = first_and_second(pixel, tmp_path)
    stacked = for_latent_base(second, find_model(str(folder)))
    ranks = {len(down) for down, _ in stacked.pairs.values()}
    assert ranks == {6}
    assert stacked.alpha is None
    second.save(tmp_path / "alone", "# card\n")
    stacked.save(tmp_path / "stacked", "# card\n")
    upon = liftkit.load_adapter(load(folder), tmp_path / "alone").transformer.state_dict()
    anew = liftkit.load_adapter(load(model_folders["flux2"]), tmp_path / "stacked").transformer.state_dict()
    wrong = liftkit.load_adapter(load(pixel), tmp_path / "alone").transformer.state_dict()
    assert all(torch.allclose(anew[name], value, atol=1e-5) for name, value in upon.items())
    assert not all(torch.allclose(wrong[name], value, atol=1e-5) for name, value in upon.items())


def test_a_third_generation_stacks_three(pixel: Path, tmp_path: Path) -> None:
    folder, second = first_and_second(pixel, tmp_path)
    second.save(tmp_path / "second", "# card\n")
    again = fuse(tmp_path / "second", str(folder), tmp_path / "again").output
    third = for_latent_base(second, find_model(str(again)))
    assert {len(down) for down, _ in third.pairs.values()} == {9}


def test_without_an_account_the_adapter_names_its_folder_and_is_refused_elsewhere(pixel: Path, tmp_path: Path) -> None:
    folder, second = first_and_second(pixel, tmp_path)
    (folder / MERGED).unlink()
    assert history_of(find_model(str(folder))) is None
    alone = for_latent_base(second, find_model(str(folder)))
    assert alone.base == "merged"
    check_needs(alone, find_model(str(folder)))
    with pytest.raises(UsageError, match="learned upon merged"):
        check_needs(alone, find_model(str(pixel)))
    alone.save(tmp_path / "alone", "# card\n")
    with pytest.raises(UsageError, match="learned upon merged"):
        fuse(tmp_path / "alone", str(pixel), tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()
    assert fuse(tmp_path / "alone", str(folder), tmp_path / "right").adapter.base is not None


@pytest.mark.parametrize(
    ("before", "words"),
    [
        ({}, "loss flow)."),
        ({"after": {"steps": 7}}, "after 7 steps"),
        ({"after": {"imported": {}}}, "after an earlier"),
    ],
)
def test_a_card_says_what_came_before_as_far_as_it_is_known(pixel: Path, before: Any, words: str) -> None:
    recipe = {"batch_size": 2, "trainable": {"mode": "lora"}, "objective": {"loss": "flow"}}
    adapter = replace(random_adapter(pixel), provenance={"steps": 3, "recipe": recipe, **before})
    assert words in card(adapter, find_model(str(pixel)), "model")


def test_a_plain_conversion_adds_nothing(pixel: Path) -> None:
    adapter = random_adapter(pixel)
    assert for_latent_base(adapter, find_model(str(pixel))) is adapter


def test_the_account_is_checked(pixel: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = Path(shutil.copytree(pixel, tmp_path / "pixel"))
    save_file({"a": torch.zeros(1)}, folder / MERGED, {"full": "no list"})
    with pytest.raises(UsageError, match="names of what was trained in full"):
        history_of(find_model(str(folder)))


@pytest.mark.parametrize(
    ("value", "stored", "kept"),
    [
        (torch.full((3,), 1.0 + 2**-10), torch.bfloat16, torch.float16),
        (torch.tensor([1e5, 1.0]), torch.bfloat16, torch.float32),
        (torch.full((3,), 3e-8), torch.bfloat16, torch.float32),
        (torch.tensor([1.0, 0.0]), torch.float32, torch.float32),
    ],
)
def test_learned_tensors_are_float16_where_their_numbers_allow(
    value: torch.Tensor, stored: torch.dtype, kept: torch.dtype
) -> None:
    found = compact(value, stored)
    assert found.dtype == kept
    assert torch.allclose(found.float(), value, rtol=1e-3, atol=0.0)


def test_a_recipe_goes_on_from_an_adapter_and_leaves_one_for_the_latent_base(
    pixel: Path, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    from liftkit.finetune.recipe import Recipe
    from liftkit.finetune.sources import find_source
    from liftkit.progress import Silent

    random_adapter(pixel, alpha=6.0).save(tmp_path / "first", "# card\n")
    recipe = Recipe(
        model=str(model_folders["flux2"]),
        adapter=str(tmp_path / "first"),
        output=tmp_path / "run",
        data={"sources": [{"kind": "demo"}]},
    )
    folder = find_source(recipe, tmp_path / "run", Silent())
    assert find_source(recipe, tmp_path / "run", Silent()).path == folder.path
    assert folder.class_of("transformer") == "AsymFlux2Transformer2DModel"
    stacked = for_latent_base(random_adapter(folder.path), folder)
    assert {len(down) for down, _ in stacked.pairs.values()} == {6}
    assert "needs" not in stacked.provenance
