"""Makes our classes attributes of diffusers, without importing it.

``DiffusionPipeline.from_pretrained`` looks a component's class up as an attribute of the library that
``model_index.json`` names. After ``import liftkit`` diffusers, whether it is imported before or after, answers
for ``Asym*`` and ``PixelAutoencoder`` too; the classes themselves are built when first asked for.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any


def register() -> None:
    """Teach diffusers our classes now, or when it is imported."""
    if "diffusers" in sys.modules:
        _teach(sys.modules["diffusers"])
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def lifted(name: str) -> Any:
    """One of our classes by name, or None."""
    if name == "PixelAutoencoder":
        from liftkit.models.autoencoder import PixelAutoencoder

        return PixelAutoencoder
    if name.startswith("Asym"):
        from liftkit.models import registry, scheduler

        if name in scheduler.SCHEDULERS:
            return getattr(scheduler, name)
        if registry.is_lifted(name):
            return getattr(registry, name)
    return None


def _teach(diffusers: ModuleType) -> None:
    stock = type(diffusers)
    if stock.__name__ == "DiffusersWithLiftkit":
        return

    class DiffusersWithLiftkit(stock):  # type: ignore[misc, valid-type]
        def __getattr__(self, name: str) -> Any:
            found = lifted(name) if name.startswith(("Asym", "PixelAutoencoder")) else None
            return super().__getattr__(name) if found is None else found

    diffusers.__class__ = DiffusersWithLiftkit


class _Finder(MetaPathFinder):
    """Sees diffusers being imported or looked for, and puts a loader that teaches it around its own."""

    searching = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "diffusers" or self.searching:
            return None
        self.searching = True
        try:
            spec = find_spec(fullname)
        finally:
            self.searching = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        # Only now: who merely asks whether diffusers is there does not import it.
        sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Finder)]
        # diffusers puts a lazy module in its own place.
        _teach(sys.modules["diffusers"])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)
