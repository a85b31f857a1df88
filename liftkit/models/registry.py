"""Which architectures liftkit knows, and their Asym classes, made when first asked for."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

from liftkit.errors import UsageError
from liftkit.models.flux2 import FLUX2
from liftkit.models.sd3 import SD3
from liftkit.models.spec import Architecture

ARCHITECTURES: dict[str, Architecture] = {each.name: each for each in (FLUX2, SD3)}
_LIFTED = {each.lifted_name: each for each in ARCHITECTURES.values()}


def architecture(class_name: str) -> Architecture:
    """The architecture of a stock or an Asym class, by its name.

    Raises:
        UsageError: if it is not supported; names those that are, and the nearest.
    """
    found = ARCHITECTURES.get(class_name) or _LIFTED.get(class_name)
    if found is None:
        near = get_close_matches(class_name, ARCHITECTURES, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UsageError(
            f"transformer class {class_name!r} is not supported; supported: {', '.join(sorted(ARCHITECTURES))}{hint}"
        )
    return found


def is_lifted(class_name: str) -> bool:
    """Whether this is the name of an Asym class."""
    return class_name in _LIFTED


def __getattr__(name: str) -> Any:
    """``Asym*`` classes are attributes of this module, built on first use."""
    if name in _LIFTED:
        from liftkit.models.mixin import make_class

        lifted = make_class(_LIFTED[name])
        globals()[name] = lifted
        return lifted
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def lifted_class(architecture: Architecture) -> Any:
    """The Asym class of an architecture."""
    return globals().get(architecture.lifted_name) or __getattr__(architecture.lifted_name)
