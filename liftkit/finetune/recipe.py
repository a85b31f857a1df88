"""The choices of a finetune.

The classes here and in :mod:`liftkit.finetune.recipe_sections` are the whole schema: ``docs/recipes.md`` and the messages of
:mod:`liftkit.finetune.recipe_file` are made from them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from liftkit.finetune.recipe_data import (
    SOURCES,
    Data,
    DatasetSource,
    DemoSource,
    FolderSource,
    Source,
    WebDatasetSource,
)
from liftkit.finetune.recipe_network import NEW, Network
from liftkit.finetune.recipe_sections import (
    Base,
    Checkpoints,
    Ema,
    Noise,
    Objective,
    Optimizer,
    Previews,
    Trainable,
    Validation,
)
from liftkit.finetune.recipe_types import File, Section, Text, Trackers
from liftkit.finetune.recipe_yaml import dump
from liftkit.finetune.terms import TERMS

__all__ = [
    "RULES",
    "SOURCES",
    "Base",
    "Checkpoints",
    "Data",
    "DatasetSource",
    "DemoSource",
    "Ema",
    "FolderSource",
    "Noise",
    "Objective",
    "Optimizer",
    "Previews",
    "Recipe",
    "Rule",
    "Section",
    "Source",
    "Trainable",
    "Validation",
    "WebDatasetSource",
]


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


class Recipe(Section):
    """One finetune, complete.

    Raises:
        pydantic.ValidationError: (a ``ValueError``) with every problem, where it is made of wrong values.
    """

    model: Annotated[
        Text,
        Field(description="A converted folder, a latent one, a Hub id, `demo`, or `new` (see `network`)."),
    ]
    network: Annotated[Network, Field(description="What a new model is, as `liftkit init` makes it.")] = Network()
    adapter: Annotated[
        Text | None,
        Field(
            description="An adapter of liftkit's or of the AsymFlow authors to go on from, merged into `model` first; null: none."
        ),
    ] = None
    output: Annotated[File, Field(description="The run folder.")]
    seed: Annotated[int, Field(ge=0, lt=2**63, description="Seed of data order, noise and new weights.")] = 0
    init: Annotated[
        Literal["pretrained", "random"], Field(description="Random: the same network from random weights, a control.")
    ] = "pretrained"
    space: Annotated[
        Literal["pixel", "latent"], Field(description="Latent: continue the latent base itself, a control.")
    ] = "pixel"
    data: Annotated[Data, Field(description="What is learned from.")]
    steps: Annotated[int, Field(ge=1, description="Optimizer steps.")] = 1000
    batch_size: Annotated[int, Field(ge=1, description="Images per optimizer step, over all devices.")] = 32
    micro_batch: Annotated[
        int | None,
        Field(ge=1, description="Images per forward on one device; gradients add up to the batch. null: no adding up."),
    ] = None
    precision: Annotated[Literal["no", "bf16", "fp16"], Field(description="Mixed precision of the network.")] = "bf16"
    gradient_checkpointing: Annotated[
        bool, Field(description="Compute activations again instead of keeping them: slower, less memory.")
    ] = False
    compile: Annotated[bool, Field(description="Run the network through torch.compile.")] = False
    threads: Annotated[int | None, Field(ge=1, description="CPU threads; null: torch's choice.")] = None
    base: Annotated[Base, Field(description="What does not learn.")] = Base()
    trainable: Annotated[Trainable, Field(description="What learns.")] = Trainable()
    optimizer: Annotated[Optimizer, Field(description="How it learns.")] = Optimizer()
    noise: Annotated[Noise, Field(description="Noise levels in training.")] = Noise()
    objective: Annotated[Objective, Field(description="What is minimized.")] = Objective()
    ema: Annotated[Ema, Field(description="Running mean of the weights.")] = Ema()
    checkpoints: Annotated[Checkpoints, Field(description="States to go on from.")] = Checkpoints()
    previews: Annotated[Previews, Field(description="Pictures along the way.")] = Previews()
    validation: Annotated[Validation, Field(description="Held-out loss.")] = Validation()
    trackers: Annotated[
        Trackers | None,
        Field(description="Where figures go beside the run folder; null: to tensorboard, where it is installed."),
    ] = None
    save: Annotated[
        Literal["model", "adapter"],
        Field(description="The result: a whole converted folder, or what was learned alone."),
    ] = "model"

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        broken = broken_rules(self.value)
        if broken:
            raise PydanticCustomError("rules", "{text}", {"text": "; ".join(text for _, text in broken)})
        return self

    def value(self, key: str) -> Any:
        """The value of a dotted key, such as ``optimizer.decay``."""
        found: Any = self
        for part in key.split("."):
            found = getattr(found, part)
        return found

    def to_yaml(self) -> str:
        """The whole recipe with every default written out; it loads again to an equal one."""
        return dump(self.model_dump(mode="json"))
