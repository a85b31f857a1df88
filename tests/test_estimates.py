"""What a step's memory is estimated at."""

from __future__ import annotations

import copy
import gc
import importlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from liftkit import convert_transformer
from liftkit.checkpoint.model import ModelFolder
from liftkit.finetune.allocations import HOST, Allocations
from liftkit.finetune.estimates import Estimate, estimate
from liftkit.finetune.recipe import Recipe
from liftkit.finetune.sketch import Sketch
from tests.zoo import ZOO
from tests.zoo.specimen import Specimen

QUICK, ROUTED = ("Flux2Transformer2DModel", "ZImageTransformer2DModel"), ("HiDreamImageTransformer2DModel",)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module("memory")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are found as Linux says them")
@pytest.mark.parametrize("name", ["flux2 LoRA", "flux2 LoRA, checkpointing", "qwen LoRA"])
def test_estimates_are_near_what_a_process_takes(memory: Any, name: str) -> None:
    found = memory.measured(name)
    taken = found["peak"] - found["libraries"]
    assert taken > 3 * 10**8, "most of it would be libraries"
    assert found["libraries"] + memory.estimated(name).resident == pytest.approx(found["peak"], rel=0.15)


@pytest.fixture
def of(memory: Any) -> Callable[..., Estimate]:
    """Estimates of a tiny model of the benchmark's, by changes to its recipe."""
    tiny = {**memory.KLEIN, "num_single_layers": 2, "num_attention_heads": 1, "joint_attention_dim": 24}

    def estimated(references: int = 0, **recipe: object) -> Estimate:
        setting = memory.Setting(
            config=tiny, side=128, text=7, recipe={"trainable": {"rank": 4}, "batch_size": 64, **recipe}
        )
        sketch = replace(setting.sketch(), references=references)
        return estimate(setting.make_recipe("unused"), sketch, setting.size, memory.SIDE)

    return estimated


def test_storages_count_from_their_first_tensor_to_their_last() -> None:
    with Allocations() as seen:
        first = torch.ones(1000)
        assert seen.live == {"activations": 4000}
        view = first[:10]
        del first
        assert seen.live["activations"] == 4000
        with torch.no_grad(), seen.part("reference pass"):
            other = view + 1.0
        assert seen.live["reference pass"] == 40
        seen.assign(HOST, [view])
        del view, other
        gc.collect()
    assert not any(seen.live.values())
    assert seen.peak == {"activations": 4000, "reference pass": 40}


def test_parts_are_those_of_the_recipe(of: Callable[..., Estimate]) -> None:
    plain = of()
    assert plain.parts["optimizer"] == pytest.approx(2 * plain.parts["running mean"], rel=0.01)
    assert plain.operations > 0
    assert of(gradient_checkpointing=True).parts["activations"] < plain.parts["activations"]
    assert of(base={"quantize": "int8"}).parts["weights"] < 0.6 * plain.parts["weights"]
    offloaded = of(base={"offload": "blocks"}, gradient_checkpointing=True)
    assert offloaded.host > 0
    assert offloaded.parts["weights"] < plain.parts["weights"]


def sketched(specimen: Specimen, **recipe: Any) -> Estimate:
    """The estimate of a tiny twin with all that looks at images beside the network."""
    latent, lift = specimen.transformer(), specimen.lift().to(torch.device("cpu"))
    twin = convert_transformer(latent, lift).requires_grad_(False).to("meta")
    sketch = Sketch(
        ModelFolder(Path("random"), "random", {}),
        specimen.spec,
        lambda dtype: copy.deepcopy(twin).to(dtype),
        lift,
        latent.state_dict(),
        7,
    )
    head = {"rank": 4, "head": {"channels": 8, "depth": 3}}
    source = {"model": "random", "output": "unused", "data": {"sources": [{"kind": "demo"}]}, "trackers": []}
    values = {**source, "batch_size": 2, "trainable": head, "objective": {"adversarial": 0.1}, **recipe}
    return estimate(Recipe.model_validate(values), sketch, (8 * lift.patch_size,) * 2, lift.patch_size)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
        for name, each in ZOO.items()
        if "finetune" not in each.without
    ],
)
def test_shapes_that_values_decide_are_found(name: str) -> None:
    """Masks, lengths and grids are known beforehand; what a router chooses is not, and that is said."""
    found = sketched(ZOO[name])
    assert found.parts["weights"] > 0
    assert found.complete == (name not in ROUTED)
    if found.complete:
        assert found.parts["activations"] > 0
        assert found.operations > 0


def test_references_count(of: Callable[..., Estimate]) -> None:
    alone, beside = (of(references=count) for count in (0, 1))
    assert beside.parts["activations"] > 1.2 * alone.parts["activations"]
    assert beside.parts["batches"] > alone.parts["batches"]


def test_nothing_of_a_sketch_stays_behind(of: Callable[..., Estimate]) -> None:
    from liftkit.color import Oklab

    of()
    images = Oklab().encode(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    assert type(images) is torch.Tensor
    assert images.isfinite().all()
