"""A frozen base in eight or four bits."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from liftkit.errors import UsageError
from liftkit.finetune.quantize import quantize_base
from liftkit.finetune.run import finetune, prepare
from liftkit.finetune.run_folder import RunFolder
from liftkit.progress import Silent
from tests.recipes import losses, recipes_in, trained


@pytest.fixture(scope="module")
def make(pixel_klein: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Recipes of short runs; overrides as on the command line."""
    return recipes_in(tmp_path_factory.mktemp("quantized"), pixel_klein)


def stored_bytes(tensor: torch.Tensor) -> int:
    """Bytes that a tensor holds, a quantized one with its scales."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(stored_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    scales = getattr(getattr(tensor, "quant_state", None), "absmax", None)
    return tensor.nbytes + (scales.nbytes if scales is not None else 0)


def test_what_is_frozen_is_in_eight_bits_and_shared_with_the_reference(make: Any) -> None:
    pytest.importorskip("torchao")
    plain, small = (
        prepare(make(name, f"base.quantize={name}"), RunFolder(make(name).output), Silent())
        for name in ("none", "int8")
    )
    network = small.trainee.network
    own = {id(each) for each in small.trainee.transformer.parameters()}
    quantized = [each for each in network.parameters() if hasattr(each, "__tensor_flatten__")]
    assert quantized
    assert all(id(each) in own and not each.requires_grad for each in quantized)
    assert not any(hasattr(each, "__tensor_flatten__") for each in small.learner.parameters.values())
    assert {name: each.dtype for name, each in small.learner.parameters.items()} == dict.fromkeys(
        small.learner.parameters, torch.float32
    )
    # The other numbers are of float32 (precision no), those of eight bits have a scale a row.
    assert sum(map(stored_bytes, quantized)) < 0.27 * sum(4 * each.numel() for each in quantized)
    weights = [
        sum(map(stored_bytes, [*each.trainee.network.parameters(), *each.trainee.network.buffers()]))
        for each in (plain, small)
    ]
    saved = sum(4 * each.numel() - stored_bytes(each) for each in quantized)
    assert weights[0] - weights[1] == saved > 0.4 * weights[0]


def test_gradients_are_near_those_of_the_unquantized_base(make: Any) -> None:
    pytest.importorskip("torchao")
    found = []
    for name in ("none", "int8"):
        trainer = prepare(
            make(f"gradients-{name}", f"base.quantize={name}", "trainable.dropout=0"),
            RunFolder(make("g").output),
            Silent(),
        )
        trainer.learner.model.train()
        trainer.learner.gradients(trainer.ahead(0, trainer.data.batch(0)))
        found.append({key: each.grad for key, each in trainer.learner.parameters.items() if each.grad is not None})
    assert found[0].keys() == found[1].keys()
    first, second = (torch.cat([each.flatten() for each in gradients.values()]) for gradients in found)
    assert torch.nn.functional.cosine_similarity(first, second, dim=0) > 0.99
    assert (first - second).norm() < 0.1 * first.norm()


def test_a_product_keeps_the_bits_for_its_backward_pass_and_no_matrix_of_floats() -> None:
    pytest.importorskip("torchao")
    layer = torch.nn.Sequential(torch.nn.Linear(256, 128)).requires_grad_(False)
    quantize_base(layer, "int8", [])
    kept: list[torch.Tensor] = []
    states = torch.randn(4, 256, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda each: kept.append(each) or each, lambda each: each):
        found = layer(states)
    assert not [each for each in kept if each.numel() >= 128 * 256]
    (gradient,) = torch.autograd.grad(found.sum(), states)
    torch.testing.assert_close(gradient, layer[0].weight.dequantize().sum(0).expand_as(gradient), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_resumed_run_equals_one_that_was_not(make: Any, precision: str) -> None:
    pytest.importorskip("torchao")
    quick = ("base.quantize=int8", f"precision={precision}", "steps=4", "checkpoints.every=2")
    whole = trained(make(f"whole-{precision}", *quick))
    recipe = make(f"parts-{precision}", *quick)
    finetune(recipe)
    finetune(recipe, resume=str(recipe.output / "checkpoints" / "step-0000002"))
    assert losses(recipe.output) == whole
    assert (recipe.output / "adapter" / "adapter.safetensors").exists()


def test_a_resumed_run_of_the_eight_bit_optimizer_equals_one_that_was_not(make: Any) -> None:
    pytest.importorskip("bitsandbytes")
    # Tensors of fewer than 4096 numbers keep their state in floats.
    recipe = make("adam", "optimizer.name=adamw8bit", "trainable.rank=64", "steps=4", "checkpoints.every=2")
    whole = trained(recipe)
    state = load_file(recipe.output / "checkpoints" / "step-0000002" / "optimizer.safetensors")
    assert {each.dtype for each in state.values()} >= {torch.uint8, torch.float32}
    finetune(recipe, resume=str(recipe.output / "checkpoints" / "step-0000002"))
    assert losses(recipe.output) == whole


def test_four_bits_halve_eight_and_pass_gradients() -> None:
    pytest.importorskip("bitsandbytes")
    generator = torch.Generator().manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(128, 256), torch.nn.Linear(256, 64)).bfloat16().requires_grad_(False)
    x = torch.randn(4, 128, generator=generator).bfloat16().requires_grad_()
    before = network(x)
    (expected,) = torch.autograd.grad(before.float().square().sum(), x)
    assert quantize_base(network, "nf4", ["1"]) == ["0"]
    after = network(x)
    (found,) = torch.autograd.grad(after.float().square().sum(), x)
    assert (after - before).norm() < 0.2 * before.norm()
    assert (found - expected).norm() < 0.3 * expected.norm()
    # Half a byte each, and a byte for each 64: the scales are in eight bits themselves.
    assert stored_bytes(network[0].weight) == 128 * 256 // 2 + 128 * 256 // 64
    assert network[1].weight.dtype == torch.bfloat16


@pytest.mark.slow
def test_fifty_steps_have_the_losses_of_the_unquantized_base(make: Any) -> None:
    pytest.importorskip("torchao")
    long = ("steps=50", "checkpoints.every=0")
    plain, small = (trained(make(f"fifty-{name}", *long, f"base.quantize={name}")) for name in ("none", "int8"))
    assert len(plain) == 50
    assert plain != small
    assert sum(small) == pytest.approx(sum(plain), rel=0.02)
    tenths = [(sum(plain[a:b]), sum(small[a:b])) for a, b in pairwise(range(0, 51, 10))]
    assert all(other == pytest.approx(one, rel=0.02) for one, other in tenths), tenths


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    network = torch.nn.Sequential(torch.nn.Linear(64, 64)).requires_grad_(False)
    for kind, package in (("int8", "torchao"), ("nf4", "bitsandbytes")):
        for name in (f"{package}.quantization", f"{package}.nn"):
            monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(
            UsageError, match=f"base.quantize: {kind}: {package} is not installed; pip install {package}"
        ):
            quantize_base(network, kind, [])


def test_there_has_to_be_something_to_quantize() -> None:
    with pytest.raises(UsageError, match="no frozen matrix of 4096 numbers or more"):
        quantize_base(torch.nn.Sequential(torch.nn.Linear(64, 64)), "int8", [])


def test_weights_that_learn_are_not_quantized(make: Any) -> None:
    with pytest.raises(UsageError, match=r"base\.quantize is for weights that do not learn"):
        make("full", "base.quantize=int8", "trainable.mode=full")
