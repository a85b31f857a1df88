"""The keys of the schema, for people: which may stand where, and what to say of what may not."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from liftkit.finetune.recipe import SOURCES, Recipe
from liftkit.finetune.recipe_yaml import Location


def location_of(error: ErrorDetails) -> Location:
    """Where an error of pydantic's belongs: it names the kind of a source as if it were a key."""
    location: Location = error["loc"]
    if location[:2] == ("data", "sources"):
        location = (*location[:3], *location[4:])
    if error["type"] == "missing" and isinstance(location[-1], int):  # an item of a list of fixed length
        location = location[:-1]
    return (*location, "kind") if error["type"].startswith("union_tag") else location


def dotted(location: Location) -> str:
    """A location as it is written in overrides."""
    return ".".join(map(str, location))


def fields_at(location: Location, plain: Any) -> Mapping[str, FieldInfo]:
    """The keys that may stand in a section; none where the location leads to no section.

    Args:
        location: of the section.
        plain: the recipe's data, which hold the kind of a source.
    """
    if location[:2] == ("data", "sources") and len(location) == 3:
        source = plain["data"]["sources"][location[2]]
        kind = source.get("kind") if isinstance(source, dict) else None
        known = [SOURCES[kind]] if kind in SOURCES else SOURCES.values()
        return {name: field for source in known for name, field in source.model_fields.items()}
    section: type[BaseModel] = Recipe
    for part in location:
        field = section.model_fields.get(str(part))
        inner = [each for each in _kinds(field) if isinstance(each, type) and issubclass(each, BaseModel)]
        if not inner:
            return {}
        section = inner[0]
    return section.model_fields


def _kinds(field: FieldInfo | None) -> tuple[Any, ...]:
    """The types that a value may have: several where a section may be null."""
    return () if field is None else get_args(field.annotation) or (field.annotation,)


def is_table(location: Location) -> bool:
    """Whether names of the user's own stand at a location, such as the modules of ``optimizer.multipliers``."""
    known = len(location) == 2 and location[0] in Recipe.model_fields
    field = _section(str(location[0])).get(str(location[1])) if known else None
    return field is not None and get_origin(field.annotation) is dict


def suggestion(word: str, choices: Iterable[str]) -> str:
    """``; did you mean X?``, or nothing where nothing is near."""
    near = difflib.get_close_matches(word, list(choices), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def unknown_key(location: Location, plain: Any) -> str:
    """What to say of a key that the schema does not have."""
    name = str(location[-1])
    here = suggestion(name, fields_at(location[:-1], plain))
    return f"{dotted(location)}: unknown key{here or _elsewhere(name)}"


def _elsewhere(name: str) -> str:
    """The key that is meant, where it stands in another section or goes by its initials."""
    paths = [top for top in Recipe.model_fields if not _section(top)]
    paths += [f"{top}.{key}" for top in Recipe.model_fields for key in _section(top)]
    for path in paths:
        key = path.rpartition(".")[2]
        if name in (key, path) or ("_" in key and name == "".join(word[0] for word in key.split("_"))):
            return f"; did you mean {path}?"
    return suggestion(name, paths)


def _section(name: str) -> Mapping[str, FieldInfo]:
    return getattr(Recipe.model_fields[name].annotation, "model_fields", {})


_EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "path": "a path",
    "is": "a path",
    "tuple": "a list",
    "dict": "a section of keys",
    "model": "a section of keys",
}
_BOUNDS = {
    "greater_than": "more than {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "less than {lt:g}",
    "less_than_equal": "at most {le:g}",
    "finite_number": "a finite number",
    "string_too_short": "some text",
}
_BOOLEANS = {"yes": "true", "on": "true", "y": "true", "no": "false", "off": "false", "n": "false"}


def explain(error: ErrorDetails, location: Location, plain: Any) -> str:
    """What to say of an error of pydantic's."""
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    name = dotted(location)
    if kind == "extra_forbidden":
        return unknown_key(location, plain)
    if kind == "missing" and location != error["loc"] and isinstance(error["loc"][-1], int):
        return f"{name}: expected {error['loc'][-1] + 1} values, found {len(value)}"
    if kind == "missing":
        field = fields_at(location[:-1], plain).get(str(location[-1]))
        about = (field and field.description) or ""
        return f"{name}: required, and missing" + (f": {about[0].lower()}{about[1:].rstrip('.')}" if about else "")
    if kind == "union_tag_not_found":
        return f"{name}: required, and missing: {_either(list(SOURCES))}"
    if kind in ("literal_error", "union_tag_invalid"):
        choices = list(SOURCES) if "tag" in context else re.findall(r"'([^']*)'", context["expected"])
        found = context.get("tag", value)
        return f"{name}: expected {_either(choices)}, found {_say(found)}{suggestion(str(found), choices)}"
    if kind in ("too_short", "too_long"):
        bound = context.get("min_length", context.get("max_length"))
        return f"{name}: expected {'at least' if kind == 'too_short' else 'at most'} {bound}, found {len(value)}"
    if kind == "value_error":
        return f"{name}: {context['error']}"
    expected = _BOUNDS.get(kind, "").format(**context) or _EXPECTED.get(kind.partition("_")[0])
    if expected is None:
        return f"{name}: {error['msg']}"
    return f"{name}: expected {expected}, found {_say(value)}{_hint(kind, value)}"


def _hint(kind: str, value: Any) -> str:
    if kind.startswith("bool") and str(value).lower() in _BOOLEANS:
        return f"; did you mean {_BOOLEANS[str(value).lower()]}?"
    if kind.startswith(("string", "is_instance", "path")) and isinstance(value, bool | int | float):
        return "; put it in quotes"
    return ""


def _either(choices: list[str]) -> str:
    return " or ".join(filter(None, [", ".join(choices[:-1]), choices[-1]]))


def _say(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, dict | list | tuple):
        return "a section" if isinstance(value, dict) else "a list"
    text = repr(value) if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
