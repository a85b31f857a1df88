"""Which classes ``model_index.json`` may name: those that diffusers and transformers have themselves.

A loader imports the library and the class that the file names, and a conversion writes both into its output. So every name
is looked up first, in the libraries' own source and without importing them, which would take seconds and much memory.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from liftkit.errors import UsageError

ROOT = "DiffusionPipeline"
LIBRARIES = ("diffusers", "transformers")
AUTOENCODERS = ("PixelAutoencoder", "AutoencoderTinyFlux2")
"""liftkit's own classes in the place of a VAE, for which diffusers answers too (:mod:`liftkit.models._diffusers`)."""
CLASS_PIPELINE = "AsymFlowClassPipeline"
"""liftkit's own pipeline, of models that are conditioned on a class."""
OWN = (*AUTOENCODERS, CLASS_PIPELINE, "JiTTransformer2DModel")
"""All of liftkit's own classes whose names do not follow from those of diffusers."""
# Classes of transformers that serve several models, and stand outside of their folders.
_SHARED = ("PreTrainedTokenizerFast", "TokenizersBackend")
_SOURCES = ("modeling_*.py", "tokenization_*.py", "*process*.py", "feature_extraction_*.py")
_EXPORTS = re.compile(r"^__all__ = \[(.*?)\]", re.DOTALL | re.MULTILINE)
_QUOTED = re.compile(r"""["']([A-Za-z_]\w*)["']""")


def check_classes(index: Mapping[str, Any], where: Path) -> None:
    """Raise unless the pipeline and all components are of classes that diffusers and transformers have.

    Args:
        index: the content of ``model_index.json``.
        where: its path, for messages.

    Raises:
        UsageError: naming the entry, what it says and what would do.
    """
    name = index.get("_class_name")
    if not isinstance(name, str) or pipeline_parts(name) is None:
        near = get_close_matches(str(name), _exported(), n=1, cutoff=0.8)
        hint = f"; did you mean {near[0]!r}?" if near and near[0] != name else ""
        raise UsageError(
            f"{where}: _class_name {_shown(name)} is no pipeline of diffusers here{hint or '; is diffusers new enough?'}"
        )
    for component, entry in index.items():
        if not component.startswith("_") and isinstance(entry, list) and len(entry) == 2:
            _check_component(component, entry[0], entry[1], where)


def pipeline_parts(name: str) -> tuple[str, tuple[str, ...]] | None:
    """A pipeline class of diffusers: its name, as diffusers writes it, and the arguments that it is made from.

    Returns:
        None if diffusers has no pipeline of that name.
    """
    if name == CLASS_PIPELINE:
        return name, ("transformer", "vae", "scheduler", "id2label")
    if not _is_identifier(name) or name not in _exported():
        return None
    found = _pipeline(name)
    return None if found is None else (found.name, _arguments(found))


def _check_component(component: str, library: Any, name: Any, where: Path) -> None:
    if not isinstance(library, str | None) or not isinstance(name, str | None) or library is name is None:
        return  # a list of two that is a setting of the pipeline, or a part that it goes without
    entry = f"{where}: {component} is [{_shown(library)}, {_shown(name)}]"
    if library not in LIBRARIES and not _is_pipeline_module(library):
        raise UsageError(
            f"{entry}: components are loaded from {' and '.join(LIBRARIES)} alone, whose code you have chosen to install"
        )
    if name is None or not _is_identifier(name) or not _is_known(str(library), name):
        near = get_close_matches(str(name), _exported(), n=1, cutoff=0.8) if library == "diffusers" else ()
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UsageError(f"{entry}: {library} here has no such class to load{hint}")


def _is_known(library: str, name: str) -> bool:
    if library == "transformers":
        return name in _SHARED or _is_model_class(name)
    if library == "diffusers":
        # It answers for our own classes too.
        return name[0].isupper() and bool({name, name.removeprefix("Asym")} & {*_exported(), *OWN})
    return any(
        re.search(rf"^class {name}\b", text, re.MULTILINE) for text in _texts("diffusers", f"pipelines/{library}")
    )


def _is_model_class(name: str) -> bool:
    """Whether transformers has a model, tokenizer or processor of this name; one that looks another up (``Auto...``) is none."""
    names = {name}
    for ending in ("TokenizerFast", "ImageProcessorFast"):
        # transformers answers for either name, whichever it has.
        if name.endswith(ending):
            names.add(name.removesuffix("Fast"))
    kinds = [kind for kind in _SOURCES if ("Token" in name) == kind.startswith("token")]
    for pattern in kinds:
        for path in _root("transformers").glob(f"models/*/{pattern}"):
            exports = _EXPORTS.search(path.read_text("utf-8"))
            if path.parent.name != "auto" and exports and names & set(_QUOTED.findall(exports[1])):
                return True
    return False


@cache
def _exported() -> frozenset[str]:
    """The names that diffusers answers for."""
    return frozenset(_QUOTED.findall((_root("diffusers") / "__init__.py").read_text("utf-8")))


@cache
def _pipeline(name: str) -> ast.ClassDef | None:
    """The definition of a class below :data:`ROOT`, wherever it stands among diffusers' pipelines."""
    pattern = re.compile(rf"^class {name}\(", re.MULTILINE)
    for text in _texts("diffusers", "pipelines"):
        if not pattern.search(text):
            continue
        for node in ast.parse(text).body:
            if isinstance(node, ast.ClassDef) and node.name == name:
                bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
                if ROOT in bases or any(base.endswith("Pipeline") and _pipeline(base) for base in bases):
                    return node
    return None


def _arguments(pipeline: ast.ClassDef) -> tuple[str, ...]:
    """Names of the arguments of a class, its own or those of the pipeline that it extends."""
    for node in pipeline.body:
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            return tuple(argument.arg for argument in (*node.args.args[1:], *node.args.kwonlyargs))
    bases = (base.id for base in pipeline.bases if isinstance(base, ast.Name) and base.id.endswith("Pipeline"))
    return next((_arguments(found) for found in map(_pipeline, bases) if found is not None), ())


def _texts(library: str, folder: str) -> list[str]:
    return [path.read_text("utf-8") for path in sorted(_root(library).glob(f"{folder}/**/*.py"))]


def _is_pipeline_module(library: Any) -> bool:
    """Whether diffusers has a package of this name among its pipelines, whose classes an index may name by it."""
    plain = isinstance(library, str) and _is_identifier(library)
    return plain and (_root("diffusers") / "pipelines" / library / "__init__.py").is_file()


@cache
def _root(library: str) -> Path:
    """The folder of an installed library, which is not imported."""
    spec = find_spec(library)
    if spec is None or spec.origin is None:
        raise UsageError(f"{library} is not installed here; install it with pip")
    return Path(spec.origin).parent


def _is_identifier(name: str) -> bool:
    return name.isascii() and name.isidentifier()


def _shown(value: Any) -> str:
    """A value of the file, short enough for a line."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
