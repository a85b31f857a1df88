"""What the keys of a recipe have to do with one another: values that go together, and keys that others leave without effect."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from liftkit.finetune.recipe_network import NEW, Network
from liftkit.finetune.terms import TERMS


@dataclass(frozen=True)
class Rule:
    """What values must have in common.

    Args:
        keys: whose values ``holds`` is given; a complaint points at the first one that is written.
        holds: whether the values go together.
        law: the rule in words.
    """

    keys: tuple[str, ...]
    holds: Callable[..., bool]
    law: str


RULES = (
    Rule(
        ("micro_batch", "batch_size"),
        lambda micro, batch: micro is None or batch % micro == 0,
        "micro_batch divides batch_size",
    ),
    Rule(
        ("objective.loss", "space"),
        lambda loss, space: loss == "flow" or space == "pixel",
        "objective.loss asymflow needs space pixel; space latent takes flow",
    ),
    Rule(
        ("objective.adversarial", "space"),
        lambda adversarial, space: adversarial == 0 or space == "pixel",
        "objective.adversarial compares images and needs space pixel; space latent takes 0",
    ),
    Rule(
        ("objective.perceptual", "objective.loss"),
        lambda perceptual, loss: perceptual == "none" or loss == "asymflow",
        "objective.perceptual is gated by the reference and needs loss asymflow; loss flow takes none",
    ),
    Rule(
        ("objective.perceptual", "objective.kappa"),
        lambda perceptual, kappa: perceptual == "none" or kappa is not None,
        "objective.perceptual needs a kappa; kappa null takes none",
    ),
    Rule(
        ("objective.terms",),
        lambda terms: terms.keys() <= TERMS.keys(),
        "objective.terms takes terms that liftkit.finetune.terms.TERMS holds when the recipe is read",
    ),
    Rule(
        ("init", "objective.loss"),
        lambda init, loss: init == "pretrained" or loss == "flow",
        "init random has no pretrained reference and needs objective.loss flow",
    ),
    Rule(
        ("data.flip", "space", "objective.loss"),
        lambda flip, space, loss: flip == 0 or (space == "pixel" and loss == "flow"),
        "data.flip mirrors images and no cached latents: it needs space pixel and objective.loss flow",
    ),
    Rule(
        ("data.crop", "space", "objective.loss"),
        lambda crop, space, loss: crop == "lanczos" or (space == "pixel" and loss == "flow"),
        "data.crop adm is for pixels alone: it needs space pixel and objective.loss flow",
    ),
    Rule(
        ("model", "objective.loss", "trainable.mode"),
        lambda model, loss, mode: model != NEW or (loss == "flow" and mode == "full"),
        "a new model has nothing to be compared with nor to adapt: it needs objective.loss flow and trainable.mode full",
    ),
    Rule(
        ("adapter", "model"),
        lambda adapter, model: adapter is None or model != NEW,
        "adapter goes on from a model that is there; model new takes null",
    ),
    Rule(
        ("network.vae", "space", "model"),
        lambda vae, space, model: model != NEW or (vae is not None) == (space == "latent"),
        "a new model of latents has both network.vae and space latent, one of pixels neither",
    ),
    Rule(
        ("objective.repa", "objective.loss", "trainable.mode"),
        lambda repa, loss, mode: repa == 0 or (loss == "flow" and mode == "full"),
        "objective.repa trains another part beside the network: it needs objective.loss flow and trainable.mode full",
    ),
    Rule(
        ("trainable.open", "space"),
        lambda opened, space: opened == 0 or space == "pixel",
        "trainable.open is about pixels; space latent takes 0",
    ),
    Rule(
        ("objective.bands", "space"),
        lambda bands, space: bands is None or space == "pixel",
        "objective.bands are those of pixels; space latent takes null",
    ),
    Rule(
        ("objective.borders", "space"),
        lambda borders, space: borders == 0 or space == "pixel",
        "objective.borders are those of patches of pixels; space latent takes 0",
    ),
    Rule(
        ("trainable.head", "space"),
        lambda head, space: head is None or space == "pixel",
        "trainable.head works on pixels; space latent takes null",
    ),
    Rule(
        ("precision", "optimizer.name"),
        lambda precision, name: precision != "fp16" or name != "muon",
        "precision fp16 takes one optimizer, and muon is two; take bf16, or adamw",
    ),
    Rule(
        ("trainable.mode", "init"),
        lambda mode, init: mode == "full" or init == "pretrained",
        "trainable.mode lora or head needs init pretrained; init random takes full",
    ),
    Rule(
        ("base.quantize", "trainable.mode"),
        lambda quantize, mode: quantize == "none" or mode != "full",
        "base.quantize is for weights that do not learn: it needs trainable.mode lora or head",
    ),
    Rule(
        ("objective.reference_precision", "objective.loss", "base.quantize"),
        lambda precision, loss, quantize: precision == "same" or (loss == "asymflow" and quantize == "none"),
        "objective.reference_precision float8 is for a reference whose weights are not quantized: it needs objective.loss asymflow "
        "and base.quantize none",
    ),
    Rule(
        ("base.offload", "gradient_checkpointing"),
        lambda offload, checkpointing: offload == "none" or checkpointing,
        "base.offload brings blocks back where they run again: it needs gradient_checkpointing true",
    ),
    Rule(
        ("base.offload", "trainable.mode", "objective.loss"),
        lambda offload, mode, loss: offload == "none" or mode != "full" or loss == "asymflow",
        "base.offload is for weights that do not learn: it needs trainable.mode lora or head, or the frozen copy of loss asymflow",
    ),
    Rule(
        ("base.offload", "base.quantize"),
        lambda offload, quantize: offload == "none" or quantize == "none",
        "base.offload is for weights that are not quantized: it needs base.quantize none",
    ),
    Rule(
        ("base.offload", "compile"),
        lambda offload, compiled: offload == "none" or not compiled,
        "base.offload exchanges weights while the network runs: it needs compile false",
    ),
    Rule(
        ("optimizer.decay_from", "optimizer.decay"),
        lambda decay_from, decay: decay_from < 1 or decay == "constant",
        "optimizer.decay linear and cosine need decay_from below 1",
    ),
    Rule(
        ("validation.quantiles", "validation.images"),
        lambda quantiles, images: images is None or quantiles <= images,
        "validation.quantiles is at most validation.images",
    ),
)


def broken_rules(value: Callable[[str], Any]) -> list[tuple[Rule, str]]:
    """The rules that do not hold, with what to say.

    Args:
        value: of a dotted key; a rule is passed over where this raises ``LookupError``.
    """
    broken = []
    for rule in RULES:
        try:
            values = [value(key) for key in rule.keys]
        except LookupError:
            continue
        if not rule.holds(*values):
            found = ", ".join(f"{key} {found}" for key, found in zip(rule.keys, values))
            broken.append((rule, f"{rule.law} (found {found})"))
    return broken


@dataclass(frozen=True)
class Idle:
    """Keys that another one leaves without effect.

    Args:
        key: whose value decides.
        used: whether the keys have an effect at a value of it.
        when: at which values they have, in words that follow the key.
        keys: that have none otherwise.
        switch: whether the other values switch off what the keys describe: who writes one knows that they do nothing.
    """

    key: str
    used: Callable[[Any], bool]
    when: str
    keys: tuple[str, ...]
    switch: bool = False


def _all(section: str, names: str) -> tuple[str, ...]:
    return tuple(f"{section}.{name}" for name in names.split())


IDLE = (
    Idle("model", lambda model: model == NEW, NEW, _all("network", " ".join(Network.model_fields))),
    Idle(
        "trainable.mode", lambda mode: mode == "lora", "lora", _all("trainable", "rank alpha dropout targets modules")
    ),
    Idle("trainable.mode", lambda mode: mode != "head", "lora or full", ("optimizer.trunk",)),
    Idle("objective.loss", lambda loss: loss == "asymflow", "asymflow", _all("objective", "kappa reference_below")),
    Idle(
        "objective.perceptual",
        lambda distance: distance != "none",
        "a distance",
        ("objective.perceptual_weight",),
        True,
    ),
    Idle("objective.repa", lambda weight: weight > 0, "above 0", _all("objective", "repa_block repa_encoder"), True),
    Idle("optimizer.decay", lambda decay: decay != "constant", "linear or cosine", ("optimizer.decay_from",), True),
    Idle("noise.latent_shift", lambda shift: shift is None, "null", ("noise.shift",)),
    Idle("ema.kind", lambda kind: kind == "karras", "karras", ("ema.gamma",)),
    Idle("ema.kind", lambda kind: kind == "constant", "constant", ("ema.decay",)),
    Idle("previews.every", bool, "above 0", _all("previews", "prompts count steps guidance seed"), True),
    Idle("validation.every", bool, "above 0", _all("validation", "images quantiles"), True),
)


def idle_keys(
    value: Callable[[str], Any], default: Callable[[str], Any], written: Callable[[str], bool]
) -> Iterator[str]:
    """In words, what a recipe sets in vain: keys that are not at their defaults and have no effect.

    They are no mistake: an override may choose another way than the one that a recipe goes on to describe.

    Args:
        value, default: of a dotted key.
        written: whether it was given, though it may be the default.
    """
    for each in IDLE:
        if each.switch and written(each.key):
            continue
        idle = [key for key in each.keys if value(key) != default(key)]
        if idle and not each.used(value(each.key)):
            found = json.dumps(value(each.key)).strip('"')
            yield f"{', '.join(idle)} (needs {each.key} {each.when}, found {found})"
