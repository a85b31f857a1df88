"""What the keys of a recipe have to do with one another: rules, and keys that others leave without effect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from liftkit.finetune.recipe import Recipe
from liftkit.finetune.recipe_rules import IDLE, RULES
from tests.recipes import SMALL, load, problems, refused


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


BROKEN = {
    ("base.quantize", "trainable.mode"): (("base.quantize=int8", "trainable.mode=full"), "int8"),
    ("objective.reference_precision", "objective.loss", "base.quantize"): (
        ("objective.reference_precision=float8", "base.quantize=int8"),
        "float8",
    ),
    ("objective.repa", "objective.loss", "trainable.mode"): (("objective.repa=0.5",), "0.5"),
    ("data.flip", "space", "objective.loss"): (("data.flip=0.5",), "0.5"),
    ("data.crop", "space", "objective.loss"): (("data.crop=adm",), "adm"),
    ("model", "objective.loss", "trainable.mode"): (("model=new", "objective.loss=flow"), "new"),
    ("adapter", "model"): (
        ("model=new", "adapter=organization/name", "objective.loss=flow", "trainable.mode=full"),
        "organization/name",
    ),
    ("network.vae", "space", "model"): (
        ("model=new", "network.vae=demo", "objective.loss=flow", "trainable.mode=full"),
        "demo",
    ),
    ("base.offload", "gradient_checkpointing"): (("base.offload=blocks",), "blocks"),
    ("base.offload", "base.quantize"): (
        ("base={offload: blocks, quantize: int8}", "gradient_checkpointing=true"),
        "blocks",
    ),
    ("base.offload", "trainable.mode", "objective.loss"): (
        ("base.offload=blocks", "gradient_checkpointing=true", "trainable.mode=full", "objective={loss: flow}"),
        "blocks",
    ),
    ("base.offload", "compile"): (("base.offload=blocks", "gradient_checkpointing=true", "compile=true"), "blocks"),
    ("micro_batch", "batch_size"): (("batch_size=10", "micro_batch=4"), "4"),
    ("objective.loss", "space"): (("space=latent",), "latent"),
    ("objective.perceptual", "objective.loss"): (("objective={loss: flow, perceptual: vae}",), "vae"),
    ("objective.perceptual", "objective.kappa"): (("objective={kappa: null, perceptual: vae}",), "vae"),
    ("objective.terms",): (("objective.terms={x: 1}",), "{"),
    ("objective.adversarial", "space"): (("space=latent", "objective={loss: flow, adversarial: 0.1}"), "0.1"),
    ("init", "objective.loss"): (("init=random", "trainable.mode=full"), "random"),
    ("trainable.open", "space"): (("space=latent", "objective.loss=flow", "trainable.open=1"), "1"),
    ("objective.borders", "space"): (("space=latent", "objective={loss: flow, borders: 20}"), "20"),
    ("objective.bands", "space"): (("space=latent", "objective={loss: flow, bands: {}}"), "{"),
    ("trainable.head", "space"): (("space=latent", "objective.loss=flow", "trainable.head={}"), "{"),
    ("trainable.mode", "init"): (("init=random", "objective.loss=flow"), "random"),
    ("precision", "optimizer.name"): (("precision=fp16", "optimizer.name=muon"), "fp16"),
    ("save", "trainable.mode"): (("trainable.mode=full", "save=adapter"), "adapter"),
    ("optimizer.decay_from", "optimizer.decay"): (("optimizer={decay: cosine, decay_from: 1}",), "1"),
    ("validation.quantiles", "validation.images"): (("validation.images=4",), "4"),
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: " ".join(rule.keys))
def test_rules_are_reported_where_they_are_broken(rule: Any) -> None:
    overrides, value = BROKEN[rule.keys]
    lines = refused(SMALL, *overrides).splitlines()
    assert lines[0] == "recipe.yaml: 1 problem"
    assert rule.law in lines[1]
    begin, end = lines[3].index("^"), lines[3].rindex("^") + 1
    assert lines[2][begin:end] == value


def test_rules_hold_in_python_too() -> None:
    with pytest.raises(ValidationError, match="micro_batch divides batch_size"):
        Recipe(model="demo", output="run", data={"sources": [{"kind": "demo"}]}, micro_batch=5)  # type: ignore[arg-type]


def test_rules_wait_for_values_that_are_wrong() -> None:
    found = problems(SMALL, "space=latent", "objective.loss=flwo", "batch_size=0", "micro_batch=5", "ema.gamma=0")
    assert len(found) == 3
    assert not any("needs" in line or "divides" in line for line in found)
    assert len(problems(SMALL, "space=latent", "objective=none")) == 1


IN_VAIN = [
    (("network.size=tiny",), "network.size (needs model new, found demo)"),
    (
        ("trainable.mode=full", "trainable.rank=8", "trainable.modules=[x_embedder]"),
        "trainable.rank, trainable.modules (needs trainable.mode lora, found full)",
    ),
    (
        ("trainable.mode=head", "trainable.alpha=1", "trainable.dropout=0", "trainable.targets=['*']"),
        "trainable.alpha, trainable.dropout, trainable.targets (needs trainable.mode lora, found head)",
    ),
    (("trainable.mode=head", "optimizer.trunk={}"), "optimizer.trunk (needs trainable.mode lora or full, found head)"),
    (
        ("objective.loss=flow", "objective.kappa=1", "objective.reference_below=0"),
        "objective.kappa, objective.reference_below (needs objective.loss asymflow, found flow)",
    ),
    (
        ("objective.perceptual_weight=2",),
        "objective.perceptual_weight (needs objective.perceptual a distance, found none)",
    ),
    (("objective.repa_block=3",), "objective.repa_block (needs objective.repa above 0, found 0.0)"),
    (("optimizer.decay_from=0.5",), "optimizer.decay_from (needs optimizer.decay linear or cosine, found constant)"),
    (("noise={shift: 3, latent_shift: 2}",), "noise.shift (needs noise.latent_shift null, found 2.0)"),
    (("ema={kind: constant, gamma: 3}",), "ema.gamma (needs ema.kind karras, found constant)"),
    (("ema.decay=0.5",), "ema.decay (needs ema.kind constant, found karras)"),
    (("previews.count=3",), "previews.count (needs previews.every above 0, found 0)"),
    (("validation.images=9",), "validation.images (needs validation.every above 0, found 0)"),
]


@pytest.mark.parametrize(("overrides", "expected"), IN_VAIN)
def test_keys_that_are_set_in_vain_are_named(overrides: tuple[str, ...], expected: str) -> None:
    assert load(SMALL, *overrides).in_vain() == f"without effect: {expected}"


def test_all_that_may_be_set_in_vain_is_tried() -> None:
    assert load(SMALL).in_vain() is None
    tried = [text.partition(" (needs ")[2] for _, text in IN_VAIN]
    assert [idle for idle in IDLE if not any(text.startswith(f"{idle.key} {idle.when},") for text in tried)] == []


@pytest.mark.parametrize(
    "override",
    ["ema={enabled: false, start: 3}", "previews={every: 0, count: 3}", "optimizer={decay: constant, decay_from: 0.5}"],
)
def test_what_was_switched_off_by_hand_is_not_named(override: str) -> None:
    assert load(SMALL, override).in_vain() is None


def test_a_recipe_written_out_goes_on_although_keys_are_set_in_vain() -> None:
    chosen = load(SMALL, "trainable.mode=full", "trainable.rank=8")
    assert load(chosen.to_yaml()) == chosen
