"""The recipes of docs/extending.md, each run as it is printed, and what it adds put to use."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file

import liftkit
from liftkit import color
from liftkit.data.batch import Batch
from liftkit.errors import UsageError
from liftkit.evaluate import figures
from liftkit.finetune import terms
from liftkit.finetune.step import Objective
from liftkit.finetune.terms import make_perceptual
from liftkit.fit.engine import fit_collected, fit_pass
from liftkit.formats import exporting
from liftkit.models import registry
from liftkit.models.flow import euler
from liftkit.options import FitOptions
from tests import tiny
from tests.adapters import random_adapter
from tests.klein import demo_source
from tests.recipes import SMALL, load, refused

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"
RECIPES = {
    title: re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    for title, text in re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.DOTALL | re.MULTILINE)
}


@pytest.fixture
def follow() -> Iterator[Any]:
    """Runs a recipe by its title, and forgets what it added."""
    liftkit.architectures()  # liftkit's own are read when first asked for
    before = [dict(each) for each in _registries()]

    def run(title: str) -> dict[str, Any]:
        (code,) = RECIPES[title]
        names: dict[str, Any] = {"__name__": "extension"}
        exec(code, names)
        return names

    yield run
    for each, known in zip(_registries(), before):
        for name in each.keys() - known.keys():
            del each[name]


def _registries() -> list[dict[str, Any]]:
    return [figures.FIGURES, terms.TERMS, terms.PERCEPTUAL, color.SPACES, exporting.FORMATS, registry._KNOWN]


def test_every_recipe_is_short_and_names_its_file() -> None:
    assert len(RECIPES) == 6
    for title, blocks in RECIPES.items():
        assert len(blocks) == 1, title
        assert len([line for line in blocks[0].splitlines() if line.strip()]) <= 15, title


def test_an_architecture(follow: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class ToyTransformer2DModel(SD3Transformer2DModel):
        pass

    monkeypatch.setattr(diffusers, "ToyTransformer2DModel", ToyTransformer2DModel, raising=False)
    toy = follow("An architecture")["TOY"]
    try:
        stock = tiny.sd3_transformer()
        latent = ToyTransformer2DModel.from_config(stock.config)
        latent.load_state_dict(stock.state_dict())
        latent, lift = latent.double(), tiny.lift()
        twin = liftkit.convert_transformer(latent, lift)
        assert type(twin).__name__ == "AsymToyTransformer2DModel"
        generator = torch.Generator().manual_seed(3)
        asked = {key: value.double() for key, value in toy.conditioning(latent.config, 2, generator).items()}
        noise = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=generator)
        tau = torch.linspace(1, 0, 4, dtype=torch.float64)
        z = euler(liftkit.open_flow(latent), lift.lower(noise), tau, asked)
        x = euler(liftkit.open_flow(twin), noise, liftkit.lift_sigma(tau, lift.scale), asked)
        lifted = liftkit.unpatchify(lift.raise_tokens(liftkit.patchify(z, 2)), tiny.PATCH, 8, 8)
        assert ((x - lifted).abs().max() / lifted.abs().max()).item() < 1e-9
    finally:
        vars(registry).pop("AsymToyTransformer2DModel", None)


def test_a_metric(follow: Any) -> None:
    follow("A metric")
    images = torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    scorer = figures.Scorer(images, patch=4, steps=1, seeds=(0,))
    assert scorer.score(images).figures["brightness"] == pytest.approx(1.0)
    assert scorer.score(0.5 * images).figures["brightness"] == pytest.approx(0.5)


def test_a_loss_term(follow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = f"{SMALL}space: latent\nobjective: {{loss: flow, terms: {{mean_color: 2}}}}\n"
    assert "objective.terms takes terms that" in refused(text)
    follow("A loss term")
    recipe = load(text)

    student: Any = SimpleNamespace(velocity=lambda state, sigma: 0.5 * state)
    x0 = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0)) + 1.0
    batch = Batch(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), x0, {}, [""] * 2, [(0, 0)] * 2)
    noise, sigma = torch.zeros_like(x0), torch.full((2,), 0.5)
    with_term, metrics, _ = Objective(recipe, student, None, None)(batch, x0, noise, sigma)
    plain = recipe.model_copy(update={"objective": recipe.objective.model_copy(update={"terms": {}})})
    without, *_ = Objective(plain, student, None, None)(batch, x0, noise, sigma)
    assert metrics["mean_color"] > 0
    assert with_term.item() == pytest.approx(without.item() + 2 * metrics["mean_color"].item())


def test_a_perceptual_distance(follow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = f"{SMALL}objective: {{perceptual: absolute}}\n"
    assert "objective.perceptual: expected none, lpips, vae or gradient, found 'absolute'" in refused(text)
    follow("A perceptual distance")
    distance = make_perceptual(load(text).objective.perceptual, None, "cpu")
    assert distance is not None
    found = distance(torch.ones(2, 3, 4, 4), torch.zeros(2, 3, 4, 4))
    assert torch.equal(found, torch.ones(2, 1, 4, 4))


def test_a_color_space(follow: Any) -> None:
    space = follow("A color space")["Opponent"]
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    fitted = space.fitted(images)
    assert torch.allclose(fitted.decode(fitted.encode(images)), images, atol=1e-5)
    source, options = demo_source(64), FitOptions(color="opponent")  # type: ignore[arg-type]
    lift = fit_collected(fit_pass(source, options, 2), options, 2)
    assert lift.color.name == "opponent"
    assert color.color_from_dict(lift.color.to_dict()) == lift.color


def test_a_file_format(follow: Any, converted: dict[str, Path], tmp_path: Path) -> None:
    given = random_adapter(converted["flux2"])
    given.save(tmp_path / "ours", "")
    with pytest.raises(UsageError, match="--format plain: unknown; choose adapter, asymflow-adapter"):
        exporting.export_adapter(str(tmp_path / "ours"), tmp_path / "out", "plain")
    follow("A file format")
    exporting.export_adapter(str(tmp_path / "ours"), tmp_path / "out", "plain")
    assert load_file(tmp_path / "out" / "plain.safetensors").keys() == given.tensors.keys()
