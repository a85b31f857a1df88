"""The latent model that a pixel twin came from, as a second view of the same blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from liftkit.models.mixin import ADDED_KEYS, channels_for


class LatentView:
    """The latent model that an Asym transformer came from, over the same blocks.

    The modules that contain an original, or that remember channels beside their weights, are the stock class's own; all others
    are the Asym transformer's, the same objects.

    Args:
        live: the Asym transformer.
        originals: the source's own modules by path.
    """

    def __init__(self, live: Any, originals: Mapping[str, nn.Module]) -> None:
        self.live, self.latent = live, _empty(live, latent=True)
        self.adapters = adapters_of(live)
        self.eights = [module for module in live.modules() if hasattr(module, "in_float8")]
        changed = (*originals, *_remembering(self.latent, _empty(live, latent=False)))
        self.own: list[tuple[nn.Module, nn.Module]] = []
        self._share(self.latent, live, "", {above for path in changed for above in _above(path)}, originals)

    def _share(
        self, ours: nn.Module, theirs: nn.Module, path: str, own: set[str], originals: Mapping[str, nn.Module]
    ) -> None:
        self.own.append((ours, theirs))
        for name, module in theirs.named_children():
            here = f"{path}.{name}" if path else name
            if here in originals:
                ours._modules[name] = originals[here]
            elif here in own:
                self._share(ours.get_submodule(name), module, here, own, originals)
            elif name in ours._modules:  # lift and detail head are not
                ours._modules[name] = module

    def model(self) -> Any:
        """The stock model, with the live model's own tensors: loading and sharding put new ones in the places of old ones."""
        for ours, theirs in self.own:
            ours.training = theirs.training
            ours._parameters.update({name: theirs._parameters[name] for name in ours._parameters})
            ours._buffers.update({name: theirs._buffers[name] for name in ours._buffers})
        return self.latent

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """Adapters live in the shared blocks: they are off while the reference runs, and what has float8 products has them then."""
        self._switch(True)
        try:
            yield
        finally:
            self._switch(False)

    def _switch(self, on: bool) -> None:
        for layer in self.adapters:
            layer._disable_adapters = on
        for layer in self.eights:
            layer.in_float8 = on


def _empty(live: Any, *, latent: bool) -> Any:
    """A model of a twin's config without memory, as the latent or the pixel one."""
    import diffusers

    spec, config = live.architecture, dict(live.config)
    kind = getattr(diffusers, spec.name) if latent else type(live)
    channels = channels_for(spec, config, latent=latent)
    # Not accelerate's way to the meta device, which makes parameters of what may have no memory already.
    with torch.device("meta"):
        return kind.from_config({key: value for key, value in channels.items() if not (latent and key in ADDED_KEYS)})


def _remembering(latent: nn.Module, pixel: nn.Module) -> list[str]:
    """Paths of modules with an attribute, beside weights, that depends on the channels."""
    others = dict(pixel.named_modules())
    found = []
    for path, module in latent.named_modules():
        theirs = vars(others[path])
        plain = ((key, value) for key, value in vars(module).items() if _is_plain(value) and not key.startswith("_"))
        if any(theirs.get(key) != value for key, value in plain):
            found.append(path)
    return found


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return isinstance(value, int | float | str)


def _above(path: str) -> list[str]:
    """A path and all that contain it, the outermost (the model itself) first."""
    parts = path.split(".") if path else []
    return [".".join(parts[:count]) for count in range(len(parts) + 1)]


def adapters_of(model: nn.Module) -> list[Any]:
    """A network's layers with adapters of peft."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
