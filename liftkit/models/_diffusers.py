"""Makes our classes attributes of diffusers, without importing it.

``DiffusionPipeline.from_pretrained`` looks a component's class up as an attribute of the library that
``model_index.json`` names. After ``import liftkit`` diffusers, whether it is imported before or after, answers
for ``Asym*`` and our autoencoders too; the classes themselves are built when first asked for.

Three more places of diffusers compare classes or channels exactly, and take ours for strangers; :data:`_LESSONS` has one
function for each, applied when that module is imported.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from liftkit.checkpoint.classes import AUTOENCODERS, CLASS_PIPELINE, OWN


def register() -> None:
    """Teach diffusers our classes now, or when it is imported."""
    logging.getLogger("diffusers.models.modeling_utils").addFilter(_says_something)
    for name, teach in _LESSONS.items():
        if name in sys.modules:
            teach(sys.modules[name])
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def lifted(name: str) -> Any:
    """One of our classes by name, or None."""
    if name == "PixelAutoencoder":
        from liftkit.models.autoencoder import PixelAutoencoder

        return PixelAutoencoder
    if name == "AutoencoderTinyFlux2":
        from liftkit.models.tiny_flux2 import AutoencoderTinyFlux2

        return AutoencoderTinyFlux2
    if name == CLASS_PIPELINE:
        from liftkit.models.classes import AsymFlowClassPipeline

        return AsymFlowClassPipeline
    if name == "JiTTransformer2DModel":
        from liftkit.models.jit import JiTTransformer2DModel

        return JiTTransformer2DModel
    if name.startswith("Asym"):
        from liftkit.models import registry, scheduler

        if name in scheduler.SCHEDULERS:
            return getattr(scheduler, name)
        if registry.is_lifted(name):
            return getattr(registry, name)
    return None


def _teach(diffusers: ModuleType) -> None:
    """Let diffusers answer for our classes."""
    stock = type(diffusers)
    if stock.__name__ == "DiffusersWithLiftkit":
        return

    class DiffusersWithLiftkit(stock):  # type: ignore[misc, valid-type]
        def __getattr__(self, name: str) -> Any:
            found = lifted(name) if name.startswith(("Asym", *OWN)) else None
            return super().__getattr__(name) if found is None else found

    diffusers.__class__ = DiffusersWithLiftkit


def _teach_types(module: ModuleType) -> None:
    """Let pipelines take our twin wherever their signature names its stock class; ``from_pipe`` compares exact types."""
    stock = module.DiffusionPipeline._get_signature_types.__func__
    if hasattr(stock, "__wrapped__"):
        return

    @functools.wraps(stock)
    def types(cls: type) -> dict[str, tuple[type, ...]]:
        return {name: (*found, *_twins(found)) for name, found in stock(cls).items()}

    module.DiffusionPipeline._get_signature_types = classmethod(types)


def _twins(types: Sequence[type]) -> list[type]:
    """Our classes that stand for stock ones."""
    names = [getattr(kind, "__name__", "") for kind in types]
    twins = [f"Asym{name}" for name in names if "Transformer" in name]
    twins += AUTOENCODERS if any(name.startswith("Autoencoder") for name in names) else []
    return [found for found in map(lifted, twins) if found is not None]


def _teach_inpainting(module: ModuleType) -> None:
    """Let SD3's inpainting run: it tells its two kinds of transformer apart by their latent channel counts."""
    pipeline = module.StableDiffusion3InpaintPipeline
    stock = pipeline.__call__
    if hasattr(stock, "of_liftkit"):
        return

    @functools.wraps(stock)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not hasattr(self.transformer, "latent_config"):
            return stock(self, *args, **kwargs)
        with self.transformer.latent_config():
            return stock(self, *args, **kwargs)

    call.of_liftkit = True  # type: ignore[attr-defined]
    pipeline.__call__ = call


_LESSONS: dict[str, Callable[[ModuleType], None]] = {
    "diffusers": _teach,
    "diffusers.pipelines.pipeline_utils": _teach_types,
    "diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3_inpaint": _teach_inpainting,
}


def _says_something(record: logging.LogRecord) -> bool:
    """False for diffusers' warning on casting modules that stay in float32, where there are none, or ours, which stay."""
    text = record.getMessage()
    idle = text.startswith(("There are modules in Asym", "There are modules in PixelAutoencoder"))
    return not (idle or "should be kept in float32: []" in text)


class _Finder(MetaPathFinder):
    """Sees modules of diffusers being imported or looked for, and puts a loader that teaches them around their own."""

    searching = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _LESSONS or self.searching:
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
        # Who merely asks whether a module is there does not import it; diffusers puts a lazy one in its own place.
        _LESSONS[module.__name__](sys.modules[module.__name__])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)
