"""The libraries without the parts that building a model does not need, for a process that does nothing but build.

Of the 3 s of a processor that importing diffusers and a pipeline takes, most is for compiling, adapters, quantization and several
devices. :func:`import_light` puts stand-ins in their place. A stand-in does nothing. What can be built with it is built as the
whole libraries build it. What cannot be built may lack only what a stand-in stands for: it has to be tried again with all of them.
"""

from __future__ import annotations

import gc
import importlib.metadata
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

MISSING = ("peft", "scipy", "torchao")
"""Packages that the libraries do without where they are not installed."""


def import_light(*, transformers: bool) -> None:
    """Import diffusers, and transformers where a component is of it, without the parts that building does not need.

    It cannot be undone: call it in a process of its own. What that has imported already stays.
    """
    names = ["torch._dynamo", *([] if transformers else ["transformers"])]
    sys.meta_path.insert(0, _Finder(tuple(name for name in names if name not in sys.modules)))
    sys.modules.update({name: None for name in MISSING if name not in sys.modules})  # type: ignore[misc]
    # From which package a module is: for that, the lists of files of all that is installed are read.
    importlib.metadata.packages_distributions = dict
    torch.set_num_threads(1)
    gc.disable()
    import diffusers  # noqa: F401


class _Finder(MetaPathFinder, Loader):
    """Finds a stand-in for some modules and all below them."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not f"{fullname}.".startswith(tuple(f"{name}." for name in self.names)):
            return None
        return ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


class _StandIn(ModuleType):
    def __getattr__(self, name: str) -> Any:
        return _anything(name)


class _Kind(type):
    def __getattr__(cls, name: str) -> Any:
        return _anything(name)

    def __call__(cls, *arguments: Any, **options: Any) -> Any:
        if cls is not Anything:
            return super().__call__(*arguments, **options)
        return arguments[0] if arguments and callable(arguments[0]) else cls

    def __bool__(cls) -> bool:
        return cls is not Anything


class Anything(metaclass=_Kind):
    """What each name of a stand-in is: a class to inherit from, a decorator that changes nothing, a function of a false result."""


def _anything(name: str) -> Any:
    # A component that it would load has to be seen as missing.
    if name.startswith("__") or name == "from_pretrained":
        raise AttributeError(name)
    return Anything
