"""Frozen blocks that wait in host memory while a run trains."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from liftkit import convert_transformer, open_flow
from liftkit.errors import UsageError
from liftkit.finetune.dry_run import describe
from liftkit.finetune.network import Network, connect, original_modules
from liftkit.finetune.offload import BlockOffload
from liftkit.finetune.run import finetune, prepare
from liftkit.finetune.run_folder import RunFolder
from liftkit.progress import Silent
from tests.recipes import losses, recipes_in, trained
from tests.zoo import auraflow, cogview4
from tests.zoo.specimen import Specimen

CHECKPOINTED = "gradient_checkpointing=true"


@pytest.fixture(scope="module")
def make(pixel_klein: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Recipes of short runs; overrides as on the command line."""
    return recipes_in(tmp_path_factory.mktemp("offloaded"), pixel_klein)


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_losses_are_those_of_the_run_without(make: Any, mode: str) -> None:
    quick = ("steps=3", f"trainable.mode={mode}", CHECKPOINTED)
    plain, waiting = (trained(make(f"{mode}-{kind}", *quick, f"base.offload={kind}")) for kind in ("none", "blocks"))
    assert len(plain) == 3
    assert waiting == plain


def test_a_resumed_run_equals_one_that_was_not(make: Any) -> None:
    recipe = make("resumed", "steps=4", "checkpoints.every=2", CHECKPOINTED, "base.offload=blocks")
    whole = trained(recipe)
    finetune(recipe, resume=str(recipe.output / "checkpoints" / "step-0000002"))
    assert losses(recipe.output) == whole


@pytest.mark.parametrize("specimen", [auraflow.SPECIMENS[0], cogview4.SPECIMENS[0]], ids=lambda each: each.name)
def test_the_reference_finds_its_own_embedding_of_patches(specimen: Specimen) -> None:
    latent = specimen.transformer()
    twin = convert_transformer(latent, specimen.lift()).requires_grad_(False)
    _, reference = connect(twin, Network(twin, original_modules(twin, latent.state_dict())))
    assert reference is not None
    flow, generator = open_flow(latent), torch.Generator().manual_seed(0)
    conditioning = specimen.spec.conditioning(latent.config, 1, generator)
    x = torch.randn(
        1, flow.channels, *(each * specimen.patch for each in specimen.spec.proof_grid), generator=generator
    )
    with torch.no_grad():
        wanted = reference.velocity(x, torch.tensor([0.5]), **conditioning)
        assert BlockOffload(twin, torch.device("cpu")).blocks
        assert torch.equal(reference.velocity(x, torch.tensor([0.5]), **conditioning), wanted)


def test_two_blocks_are_there_at_once_and_only_what_is_frozen_waits(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make("watched", CHECKPOINTED, "base.offload=blocks")
    trainer = prepare(recipe, RunFolder(recipe.output), Silent())
    (offload,) = trainer.learner.offloads
    assert len(offload.blocks) > 2
    came: list[int] = []
    honest = BlockOffload._fetch

    def fetch(self: BlockOffload, number: int) -> None:
        if number not in self.here and 0 <= number < len(self.blocks):
            came.append(number)
        honest(self, number)
        assert sum(bool(block[0].numel()) for block in self.blocks) <= 2

    monkeypatch.setattr(BlockOffload, "_fetch", fetch)
    trainer.learner.learn(trainer.ahead(0, trainer.data.batch(0)), 0)
    last = len(offload.blocks) - 1
    assert came[-last:] == list(range(last - 1, -1, -1)), "the backward pass goes the other way"
    waiting = {id(each) for block in offload.blocks for each in block}
    learning = [each for each in trainer.learner.parameters.values() if each.requires_grad]
    assert not waiting & {id(each) for each in learning}
    assert all(each.numel() for each in learning)


def test_what_is_asked_for_while_it_is_away_fails(make: Any) -> None:
    recipe = make("away", CHECKPOINTED, "base.offload=blocks")
    trainer = prepare(recipe, RunFolder(recipe.output), Silent())
    block = trainer.learner.offloads[0].blocks[0]
    weight = next(each for each in block if each.ndim == 1 or each.numel() == 0)
    with pytest.raises(RuntimeError):
        torch.nn.functional.linear(torch.ones(2, 64), weight.data)


def test_a_dry_run_says_what_waits_in_host_memory(make: Any) -> None:
    said = {}
    for kind in ("none", "blocks"):
        recipe = make(f"dry-{kind}", CHECKPOINTED, f"base.offload={kind}")
        said[kind] = {name: text for _, table in describe(recipe, Silent()) for name, text in table}
    assert "waiting" not in said["none"]["peak memory"]
    assert "waiting" in said["blocks"]["peak memory"]
    weights = [re.search(r"weights ([\d.]+) MB", said[kind]["peak memory"]) for kind in ("none", "blocks")]
    assert all(weights)
    assert float(weights[0][1]) > float(weights[1][1])


def test_a_model_without_blocks_is_refused() -> None:
    class Bare(torch.nn.Linear):
        _repeated_blocks: Any = ()
        _no_split_modules: Any = None

    with pytest.raises(UsageError, match=r"base\.offload: Bare has no blocks with frozen weights; set it to none"):
        BlockOffload(Bare(2, 2), torch.device("cpu"))


@pytest.mark.parametrize(
    ("overrides", "law"),
    [
        (("base.offload=blocks",), "needs gradient_checkpointing true"),
        (("base.offload=blocks", CHECKPOINTED, "base.quantize=int8"), "needs base.quantize none"),
        (("base.offload=blocks", CHECKPOINTED, "compile=true"), "needs compile false"),
    ],
)
def test_what_does_not_go_together_is_said(make: Any, overrides: tuple[str, ...], law: str) -> None:
    with pytest.raises(UsageError, match=law):
        make("refused", *overrides)
