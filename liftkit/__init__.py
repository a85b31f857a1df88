"""liftkit turns a pretrained latent flow model into a pixel flow model, and finetunes it.

    import liftkit                                   # diffusers now knows our classes
    from diffusers import DiffusionPipeline
    pipe = DiffusionPipeline.from_pretrained("converted-folder")

Names are resolved when first used, so that importing liftkit costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from liftkit.models import _diffusers

_NAMES = {
    "patchify": "liftkit.tokens",
    "unpatchify": "liftkit.tokens",
    "calibrate": "liftkit.asymflow",
    "lift_sigma": "liftkit.asymflow",
    "recover_velocity": "liftkit.asymflow",
    "Lift": "liftkit.lift",
    "TokenMoments": "liftkit.fit.moments",
    "fit_procrustes": "liftkit.fit.procrustes",
    "fit_pca": "liftkit.fit.pca",
    "fit_jacobian": "liftkit.fit.jacobian",
    "convert_transformer": "liftkit.models.surgery",
    "convert": "liftkit.conversion.execute",
    "verify": "liftkit.conversion.audit:audit",
    "load_adapter": "liftkit.formats.adapters",
    "lift_lora": "liftkit.formats.lora",
    "open_flow": "liftkit.models.flow",
    "architectures": "liftkit.models.registry",
    "register": "liftkit.models.registry",
    "Architecture": "liftkit.models.spec",
    "Guidance": "liftkit.options",
    "guided": "liftkit.models.guidance",
    "PixelAutoencoder": "liftkit.models.autoencoder",
    "LiftkitError": "liftkit.errors",
    "UsageError": "liftkit.errors",
    "ProofError": "liftkit.errors",
}
_MODULES = ("color", "finetune")

__all__ = [*_NAMES, *_MODULES]

try:
    __version__ = version("liftkit")
except PackageNotFoundError:
    __version__ = "0.0.0+source"


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"liftkit.{name}")
    if name in _NAMES:
        module, _, attribute = _NAMES[name].partition(":")
        value = getattr(import_module(module), attribute or name)
    elif name.startswith("Asym"):
        value = _diffusers.lifted(name)
    else:
        value = None
    if value is None:
        raise AttributeError(f"module 'liftkit' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__", "__doc__", "__file__", "__name__", "__path__"])


_diffusers.register()
