"""What a step's memory is estimated at."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from liftkit.finetune.allocations import HOST, Allocations
from liftkit.finetune.estimates import Estimate, estimate


@pytest.fixture
def of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Estimate]:
    """Estimates of a tiny model of the benchmark's, by changes to its recipe."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    memory = importlib.import_module("memory")
    tiny = {**memory.KLEIN, "num_single_layers": 2, "num_attention_heads": 1, "joint_attention_dim": 24}

    def estimated(**recipe: object) -> Estimate:
        setting = memory.Setting(
            config=tiny, side=128, text=7, recipe={"trainable": {"rank": 4}, "batch_size": 64, **recipe}
        )
        return estimate(setting.make_recipe("unused"), setting.sketch(), setting.size, memory.SIDE)

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


def test_nothing_of_a_sketch_stays_behind(of: Callable[..., Estimate]) -> None:
    from liftkit.color import Oklab

    of()
    images = Oklab().encode(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    assert type(images) is torch.Tensor
    assert images.isfinite().all()
