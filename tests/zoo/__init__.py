"""One tiny specimen of each architecture: a transformer and its stock pipeline with random weights, made in moments.

A family's specimens are in a module of this package, a tuple named SPECIMENS; :data:`ZOO` finds them by itself, and
``tests/test_conformance.py`` holds each of them to the whole suite.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from tests.zoo.specimen import Specimen

ZOO: dict[str, Specimen] = {
    specimen.name: specimen
    for module in iter_modules(__path__)
    for specimen in getattr(import_module(f"{__name__}.{module.name}"), "SPECIMENS", ())
}
