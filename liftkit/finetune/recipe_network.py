"""The section ``network`` of a recipe: the choices of ``liftkit init``, for models that a recipe makes from nothing."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_type_hints

from pydantic import Field, create_model

from liftkit.finetune.recipe_sections import File, Section
from liftkit.options import InitOptions

NEW = "new"
"""The word for a new model in the place of a folder."""


class _Network(Section):
    """What a new model is; the options of `liftkit init`."""

    def options(self, seed: int) -> InitOptions:
        """As ``liftkit init`` takes them."""
        return InitOptions(**dict(self), seed=seed)


def _fields() -> dict[str, Any]:
    hints = get_type_hints(InitOptions, include_extras=True)
    found: dict[str, Any] = {}
    for each in fields(InitOptions):
        if each.name in ("seed", "overwrite"):
            continue
        kind, option = get_args(hints[each.name])
        kind = File | None if Path in get_args(kind) else kind
        bounds = {"ge": option.min, "le": option.max} if get_args(kind) != (int, Literal["auto"]) else {}
        found[each.name] = (kind, Field(default=each.default, description=option.help, **bounds))
    return found


if TYPE_CHECKING:
    Network = _Network
else:
    Network = create_model("Network", __base__=_Network, __doc__=_Network.__doc__, **_fields())
