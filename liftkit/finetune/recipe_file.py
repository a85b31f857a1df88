"""Recipes from files: read, overridden, checked; all that is wrong is reported at once."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from yaml.error import Mark
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from liftkit.checkpoint.files import expanded, reason
from liftkit.checkpoint.misplaced import near
from liftkit.checkpoint.source import open_regular
from liftkit.errors import UsageError
from liftkit.finetune.recipe import Recipe
from liftkit.finetune.recipe_paths import missing_paths
from liftkit.finetune.recipe_problems import Problem, Source, report, spot
from liftkit.finetune.recipe_rules import broken_rules
from liftkit.finetune.recipe_schema import explain, is_table, location_of
from liftkit.finetune.recipe_yaml import BAD, CORE, Location, Plain, YamlError, compose
from liftkit.finetune.shipped import shipped_recipe, shipped_recipes

LARGEST = 256 * 1024
"""Bytes of a recipe file at most."""


def load_recipe(path_or_shipped_name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        path_or_shipped_name: a YAML file, or the bare name of a shipped recipe.
        overrides: ``section.key=value``, the value in YAML; items of lists by number, ``data.sources.0.path=photos``.
            Later ones win. Relative paths, here and in the file, are those of the current directory.

    Raises:
        UsageError: if anything is wrong; its text is the whole report, with the place of each problem.
    """
    path = _locate(path_or_shipped_name)
    reading = _Reading(str(path), _read(path))
    for override in overrides:
        reading.override(override)
    return reading.finish()


def _locate(name: str | Path) -> Path:
    path = expanded(name)
    if str(name) == path.name and path.name in shipped_recipes():
        return shipped_recipe(path.name)
    if path.exists():
        return path
    if path.stem in shipped_recipes():
        raise UsageError(f"{name}: no such file; for the recipe that is shipped give its name alone, {path.stem}")
    yaml = path.with_name(f"{path.name}.yaml")
    close = [str(yaml)] if yaml.exists() else difflib.get_close_matches(path.name, shipped_recipes(), n=1)
    hint = f"; did you mean {close[0]}?" if close else near(path) or f"; shipped are {', '.join(shipped_recipes())}"
    raise UsageError(f"{name}: no such recipe{hint}")


def _read(path: Path) -> str:
    if path.is_dir():
        raise UsageError(
            f"{path}: a folder; a recipe is a YAML file (to go on with a run, give its folder by --resume alone)"
        )
    try:
        with open_regular(path) as file:
            content = file.read(LARGEST + 1)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({reason(error)}); a recipe is a YAML file") from error
    if len(content) > LARGEST:
        raise UsageError(f"{path}: larger than {LARGEST // 1024} KiB; a recipe is a small YAML file")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{path}:{line}: is no UTF-8 text; save the recipe as UTF-8") from error


class _Reading:
    """One recipe on its way from text to values; problems gather until the end."""

    def __init__(self, name: str, text: str) -> None:
        self.name = name
        self.sources: list[Source] = []
        self.problems: list[Problem] = []
        self.root = self._compose(Source(name, text), text)
        if self.root is not None and not isinstance(self.root, MappingNode):
            self._at(self.root, "a recipe is made of keys and values, such as model: demo")
            self.root = None

    def override(self, text: str) -> None:
        """Set one key. Whether the schema knows it is seen when everything is checked."""
        keys, equals, value = text.partition("=")
        steps = [(match[0], match.start()) for match in re.finditer(r"[^.]+", keys)]
        if not equals or not value.strip() or ".".join(name for name, _ in steps) != keys or not steps:
            self.sources.append(Source("override", text, short=True))
            self._at(
                _word(str(len(self.sources) - 1), "", len(text) if equals and keys else 0), "expected section.key=value"
            )
            return
        # Blanks in place of the keys, so that the value's marks are those of the whole text.
        node = self._compose(Source("override", text, short=True), " " * (len(keys) + 1) + value)
        if is_table(tuple(name for name, _ in steps[:2])) and len(steps) > 2:
            steps[2:] = [(keys[steps[2][1] :], steps[2][1])]
        if node is not None and self.root is not None:
            self.root = self._set(self.root, steps, node)

    def finish(self) -> Recipe:
        """The recipe.

        Raises:
            UsageError: with all problems.
        """
        recipe = self._check(self.root) if self.root is not None else None
        if recipe is None or self.problems:
            raise UsageError(report(self.name, self.sources, self.problems))
        return recipe

    def _compose(self, source: Source, text: str) -> Node | None:
        """The node of a text; nothing, after a complaint, where it is no YAML, and an empty section where it is blank."""
        self.sources.append(source)
        name = str(len(self.sources) - 1)
        try:
            node = compose(text, name)
        except YamlError as error:
            self.problems += [Problem(len(self.sources) - 1, *place) for place in error.places]
            return None
        blank = node is None or (isinstance(node, ScalarNode) and node.tag == f"{CORE}null" and not node.value)
        return _empty(_word(name, "", 0)) if blank else node

    def _at(self, node: Node, message: str) -> None:
        line, column, width = spot(node)
        self.problems.append(Problem(int(node.start_mark.name), line, column, message, width))

    def _set(self, node: Node, steps: list[tuple[str, int]], value: Node) -> Node:
        """A copy of the nodes in which one value is another; aliases of what is copied keep theirs."""
        if not steps:
            return value
        (name, column), *rest = steps
        key = _word(value.start_mark.name, name, column)
        if isinstance(node, ScalarNode) and node.tag == f"{CORE}null":
            node = _empty(key)
        if isinstance(node, SequenceNode) and name.isdecimal() and int(name) < len(node.value):
            items = list(node.value)
            items[int(name)] = self._set(items[int(name)], rest, value)
            return SequenceNode(node.tag, items, node.start_mark, node.end_mark)
        if isinstance(node, MappingNode):
            old = next(((k, v) for k, v in node.value if isinstance(k, ScalarNode) and k.value == name), None)
            new = (old[0], self._set(old[1], rest, value)) if old else (key, self._set(_empty(key), rest, value))
            pairs = [new if pair == old else pair for pair in node.value] if old else [*node.value, new]
            return MappingNode(node.tag, pairs, node.start_mark, node.end_mark)
        count = len(node.value) if isinstance(node, SequenceNode) else 0
        what = f"the list has items 0 to {count - 1}" if count else "what stands before it is no section"
        self._at(key, f"{name}: {what}")
        return node

    def _check(self, root: Node) -> Recipe | None:
        reader = Plain(self._at)
        plain = reader(root)
        wrong: set[Location] = set()
        recipe = None
        try:
            recipe = Recipe.model_validate(plain)
        except ValidationError as error:
            for details in error.errors(include_url=False):
                if details["type"] == "rules":
                    continue
                location = location_of(details)
                wrong.add(location)
                if details["input"] is not BAD:
                    self._say(
                        reader, location, explain(details, location, plain), key=details["type"] == "extra_forbidden"
                    )

        def value(key: str) -> Any:
            return _value(plain, tuple(key.split(".")), wrong)

        for rule, text in broken_rules(value):
            locations = (tuple(key.split(".")) for key in rule.keys)
            self._say(reader, next(each for each in locations if each in reader.places), text)
        for location, text in missing_paths(plain):
            if location not in wrong:
                self._say(reader, location, text)
        return recipe

    def _say(self, reader: Plain, location: Location, message: str, *, key: bool = False) -> None:
        """Complain where a location leads: at the value, or at the key where that is asked or nothing stands there."""
        name, value, found = reader.find(location)
        blank = isinstance(value, ScalarNode) and value.start_mark.index == value.end_mark.index
        self._at(value if name is None or (found and not key and not blank) else name, message)


def _word(source: str, text: str, column: int) -> ScalarNode:
    begin, end = (Mark(source, 0, 0, place, None, 0) for place in (column, column + len(text)))
    return ScalarNode(f"{CORE}str", text, begin, end)


def _empty(key: Node) -> MappingNode:
    return MappingNode(f"{CORE}map", [], key.start_mark, key.end_mark)


def _default(section: type[BaseModel], location: Location) -> Any:
    """The default of a location, also within a section that has to be written."""
    field = section.model_fields[str(location[0])]
    if len(location) > 1 and field.is_required():
        assert isinstance(field.annotation, type)
        return _default(field.annotation, location[1:])
    return reduce(getattr, map(str, location[1:]), field.default)


def _value(plain: dict[str, Any], location: Location, wrong: set[Location]) -> Any:
    """What a location holds, or its default; ``LookupError`` where what it holds is wrong."""
    if any(location[:depth] in wrong for depth in range(1, len(location) + 1)):
        raise LookupError(location)
    held: Any = plain
    for part in location:
        if part not in held:
            return _default(Recipe, location)
        held = held[part]
    return held
