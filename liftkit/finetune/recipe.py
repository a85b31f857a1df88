"""The choices of a finetune.

The classes here and in :mod:`liftkit.finetune.recipe_sections` are the whole schema: ``docs/recipes.md`` and the messages of
:mod:`liftkit.finetune.recipe_file` are made from them.
"""

from __future__ import annotations

from functools import reduce
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
from liftkit.finetune.recipe_network import Network
from liftkit.finetune.recipe_rules import broken_rules, idle_keys
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

__all__ = [
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
    "Section",
    "Source",
    "Trainable",
    "Validation",
    "WebDatasetSource",
]


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

    def in_vain(self) -> str | None:
        """A line with the keys that were set and that others leave without effect; None where there are none."""

        def default(key: str) -> Any:
            section, *rest = key.split(".")
            return reduce(getattr, rest, type(self).model_fields[section].default)

        def written(key: str) -> bool:
            section, name = key.split(".")
            return name in getattr(self, section).model_fields_set

        found = "; ".join(idle_keys(self.value, default, written))
        return f"without effect: {found}" if found else None

    def to_yaml(self) -> str:
        """The whole recipe with every default written out; it loads again to an equal one."""
        return dump(self.model_dump(mode="json"))
