"""The section ``network`` of a recipe: the choices of ``liftkit init``, for models that a recipe makes from nothing."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_type_hints

from pydantic import Field, PlainValidator, WithJsonSchema, create_model

from liftkit.finetune.recipe_types import File, Section
from liftkit.options import InitOptions, rank_or_auto

NEW = "new"
"""The word for a new model in the place of a folder."""


def _rank(value: object) -> object:
    if value != "auto" and (type(value) is not int or value < 0):
        raise ValueError(f"expected a whole number, at least 0, or auto, found {str(value)[:60]}")
    return value


Rank = Annotated[
    Any,
    PlainValidator(_rank),
    WithJsonSchema(
        {"anyOf": [{"type": "integer", "minimum": 0}, {"const": "auto", "type": "string", "enum": ["auto"]}]}
    ),
]


class _Network(Section):
    """What a new model is; the options of `liftkit init`."""

    def options(self, seed: int) -> InitOptions:
        """As ``liftkit init`` takes them."""
        return InitOptions(**dict(self), seed=seed)


def _fields() -> dict[str, Any]:
    hints = get_type_hints(InitOptions, include_extras=True)
    found: dict[str, Any] = {}
    for each in fields(InitOptions):
        if each.name in ("seed", "overwrite", "weights"):
            continue
        kind, option = get_args(hints[each.name])
        kind = File | None if Path in get_args(kind) else Rank if option.parse is rank_or_auto else kind
        bounds = {} if kind is Rank else {"ge": option.min, "le": option.max}
        found[each.name] = (kind, Field(default=each.default, description=option.help, **bounds))
    return found


if TYPE_CHECKING:
    Network = _Network
else:
    Network = create_model("Network", __base__=_Network, __doc__=_Network.__doc__, **_fields())
