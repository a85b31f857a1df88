"""Which architectures liftkit knows, and their Asym classes, made when first asked for.

liftkit's own are in :mod:`liftkit.models.families`. Others are added from outside: by :func:`register`, or by packages through
the entry point group ``liftkit.architectures``, each entry an :class:`Architecture <liftkit.models.spec.Architecture>`.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pkgutil import iter_modules
from typing import Any

from liftkit.errors import LiftkitError, UsageError
from liftkit.models import GROUP, families
from liftkit.models.spec import Architecture

GUIDE = "docs/extending.md"
_KNOWN: dict[str, Architecture] = {}


def architectures() -> dict[str, Architecture]:
    """All architectures by the name of their stock class: liftkit's own, those of installed packages, and registered ones.

    Raises:
        LiftkitError: if a package's entry point cannot be loaded.
    """
    _load_own()
    _load_packages()
    return dict(_KNOWN)


def register(architecture: Architecture) -> None:
    """Add an architecture: from then on every command converts, proves, samples and finetunes models of its class.

    Args:
        architecture: of a class of diffusers that is not known yet; registering the same object again does nothing.

    Raises:
        UsageError: if another architecture has that name.
    """
    _load_own()
    known = _KNOWN.setdefault(architecture.name, architecture)
    if known is not architecture:
        raise UsageError(f"{architecture.name}: an architecture of this name is registered already; names are unique")


def architecture(class_name: str) -> Architecture:
    """The architecture of a stock or an Asym class, by its name.

    Raises:
        UsageError: if it is not supported; names those that are, and the nearest.
    """
    known = architectures()
    found = known.get(class_name) or _lifted().get(class_name)
    if found is None:
        raise UsageError(unknown(class_name, known))
    return found


def unknown(name: str, known: Iterable[str]) -> str:
    """What to say of a class that is not supported."""
    near = get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"transformer class {name!r} is not supported{hint}; liftkit models lists those that are, {GUIDE} says how to add one"


def is_lifted(class_name: str) -> bool:
    """True for the name of an Asym class."""
    return class_name in _lifted()


def _lifted() -> dict[str, Architecture]:
    return {each.lifted_name: each for each in architectures().values()}


@cache
def _load_own() -> None:
    """Every entry of every family; an import between two of them is not a second one."""
    for module in iter_modules(families.__path__):
        for found in vars(import_module(f"{families.__name__}.{module.name}")).values():
            if isinstance(found, Architecture):
                _KNOWN[found.name] = found


@cache
def _load_packages() -> None:
    """Register what installed packages offer."""
    for entry in entry_points(group=GROUP):
        try:
            register(entry.load())
        except (ImportError, AttributeError) as error:
            raise LiftkitError(
                f"architecture {entry.name!r} of an installed package cannot be loaded ({error})"
            ) from error


def __getattr__(name: str) -> Any:
    """``Asym*`` classes are attributes of this module, built on first use."""
    if name.startswith("Asym") and name in _lifted():
        from liftkit.models.mixin import make_class

        lifted = make_class(_lifted()[name])
        globals()[name] = lifted
        return lifted
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def lifted_class(architecture: Architecture) -> Any:
    """The Asym class of an architecture."""
    return globals().get(architecture.lifted_name) or __getattr__(architecture.lifted_name)
