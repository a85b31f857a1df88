"""The files and folders that a recipe names: are they there?"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeGuard

from yaml.nodes import ScalarNode

from liftkit.checkpoint.files import expanded
from liftkit.checkpoint.misplaced import is_hub_id, misplaced, near
from liftkit.embedded import MODELS, VAES
from liftkit.finetune.recipe_network import NEW
from liftkit.finetune.recipe_schema import dotted
from liftkit.finetune.recipe_types import is_local
from liftkit.finetune.recipe_yaml import CORE, Location, Plain, YamlError, compose

EMBEDDED = (NEW, *MODELS, *VAES)


def missing_paths(plain: dict[str, Any]) -> Iterator[tuple[Location, str]]:
    """Locations of paths that lead nowhere, with what to say.

    Args:
        plain: a recipe's data; what is of a wrong type is passed over.
    """
    model = plain.get("model")
    if _is_text(model) and model not in (*MODELS, NEW) and not os.path.isdir(os.path.expanduser(model)):
        if expanded(model).exists():
            yield ("model",), f"model: expected a diffusers folder, {model} is {misplaced(model)}"
        elif not is_hub_id(model):
            hint = (
                near(expanded(model))
                or f"; expected a folder (liftkit convert makes one), a Hub id, or {' or '.join(MODELS)}"
            )
            yield ("model",), f"model: no folder {model}{hint}"
    adapter = plain.get("adapter")
    if _is_text(adapter) and not (
        os.path.exists(os.path.expanduser(adapter)) or is_hub_id("/".join(adapter.split("/")[:2]))
    ):
        yield ("adapter",), f"adapter: no folder {adapter}{near(expanded(adapter))}"
    data = _section(plain.get("data"))
    for key, path in (("output", plain.get("output")), ("data.cache", data.get("cache"))):
        if _is_text(path) and expanded(path).is_file():
            yield tuple(key.split(".")), f"{key}: {path} is a file; expected a folder, or a name for a new one"
    for lead, source in _sources(data):
        for inner, text in _missing_of(source):
            yield (*lead, *inner), f"{dotted((*lead, *inner))}: {text}"


def paths_from(text: str, directory: Path) -> dict[str, Any]:
    """Relative paths of a recipe that lead nowhere from here but somewhere from another directory, by dotted key.

    Args:
        text: of the recipe; nothing is found in one that is wrong.
        directory: to look from.
    """
    try:
        plain = Plain(lambda node, message: None)(compose(text, "") or ScalarNode(f"{CORE}null", ""))
    except YamlError:
        return {}
    found = {}
    for location, path in _relative(_section(plain)):
        if not glob.glob(path) and glob.glob(str(directory / path)):
            found[".".join(map(str, location))] = str(directory / path)
    return found


def _relative(plain: dict[str, Any]) -> Iterator[tuple[Location, str]]:
    """Values of a recipe that may be relative paths."""
    data, network = (_section(plain.get(key)) for key in ("data", "network"))
    named: list[tuple[Location, Any]] = [
        (("model",), plain.get("model")),
        *((("network", key), network.get(key)) for key in ("vae", "subspace", "images", "classes")),
    ]
    # The names of what is embedded, and a number of classes, are no paths even where a folder is called so.
    places = [each for each in named if each[1] not in EMBEDDED and not str(each[1]).isdecimal()]
    places += [(("adapter",), plain.get("adapter")), (("data", "cache"), data.get("cache"))]
    for lead, source in _sources(data):
        places.append(((*lead, "path"), source.get("path")))
        urls = source.get("urls")
        places += [((*lead, "urls", n), url) for n, url in enumerate(urls)] if isinstance(urls, list) else []
    for location, value in places:
        if _is_text(value) and not os.path.isabs(os.path.expanduser(value)):
            yield location, value


def _section(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _sources(data: dict[str, Any]) -> Iterator[tuple[Location, dict[str, Any]]]:
    """The sources that are sections, with their locations."""
    sources = data.get("sources")
    for place, source in enumerate(sources if isinstance(sources, list) else []):
        if isinstance(source, dict):
            yield ("data", "sources", place), source


def _missing_of(source: dict[str, Any]) -> Iterator[tuple[Location, str]]:
    kind, path, urls = (source.get(key) for key in ("kind", "path", "urls"))
    if kind == "folder" and _is_text(path) and not os.path.isdir(os.path.expanduser(path)):
        yield ("path",), f"no folder {path}{near(expanded(path))}"
    # Anything else may be a name on the Hub.
    if kind == "dataset" and _is_text(path) and path.startswith((".", "/", "~")):
        local = expanded(path)
        if not local.exists():
            yield ("path",), f"no folder {path}{near(local)}"
    if kind == "webdataset":
        from liftkit.data.braces import expand_braces

        for place, url in enumerate(urls if isinstance(urls, list) else [urls]):
            names = expand_braces(os.path.expanduser(url)) if _is_text(url) and is_local(url) else []
            absent = [name for name in names if not glob.glob(name)]
            if absent:
                yield ("urls", place) if isinstance(urls, list) else ("urls",), f"no file {absent[0]}"


def _is_text(value: object) -> TypeGuard[str]:
    return isinstance(value, str) and bool(value.strip()) and "\0" not in value
