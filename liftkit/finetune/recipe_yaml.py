"""The YAML of recipes: the core schema of YAML 1.2, strict, with the place of every key and value.

Where PyYAML (YAML 1.1) surprises, 1.2 is followed: ``no``, ``yes``, ``on`` and ``off`` are words, ``1e-4`` and ``1e4`` are
numbers, ``012`` is twelve, and dates are words. ``1_000`` is a number as well. Keys that stand twice, tags and a second
document are errors; anchors and aliases are fine.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from yaml.reader import ReaderError

MOST_VALUES = 20_000
"""Values in a recipe, each alias counted as often as it is used."""
DEEPEST = 30
"""Lists and sections within each other."""
BAD: Any = object()
"""Stands for a value that was complained about already."""

Complain = Callable[[Node, str], None]
Location = tuple[str | int, ...]
"""Keys and list indices from the root; pydantic's, without the ``kind`` of a source."""

CORE = "tag:yaml.org,2002:"
_DIGITS = r"[0-9]+(?:_[0-9]+)*"
_WORDS = {"null": r"~|null|Null|NULL|", "bool": r"true|True|TRUE|false|False|FALSE"}
_INT = rf"[-+]?{_DIGITS}|0o[0-7]+|0x[0-9a-fA-F]+"
_FLOAT = (
    rf"[-+]?(?:\.{_DIGITS}|{_DIGITS}(?:\.(?:{_DIGITS})?)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
_KINDS = {
    "null": (_WORDS["null"], ["~", "n", "N", ""]),
    "bool": (_WORDS["bool"], list("tTfF")),
    "int": (_INT, list("-+0123456789")),
    "float": (_FLOAT, list("-+.0123456789")),
}


_PLAINLY = {
    "mapping values are not allowed": "a ':' where no key can stand; put text that holds ': ' in quotes, and check the indentation",
    "expected <block end>": "indented unlike what it should stand beside",
    "could not find expected ':'": "a line without ':' among keys; a key needs 'key: value'",
}
"""What PyYAML says, for people."""


class YamlError(Exception):
    """Text that is no recipe's YAML.

    Args:
        places: line and column, from 0, with what is wrong there.
    """

    def __init__(self, *places: tuple[int, int, str]) -> None:
        super().__init__(places[0][2])
        self.places = places


class _Loader(yaml.SafeLoader):
    """Text to nodes; nothing makes objects of them."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML's own attribute)


class _Dumper(yaml.SafeDumper):
    """Quotes what either YAML would take for something else than text."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002
        return True


def _text(dumper: _Dumper, text: str) -> ScalarNode:
    # PyYAML would write rare line breaks raw, and read them back as blanks.
    return dumper.represent_scalar(f"{CORE}str", text, style='"' if re.search("[\x85\u2028\u2029]", text) else None)


_Dumper.add_representer(str, _text)
for _kind, (_pattern, _first) in _KINDS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"{CORE}{_kind}", re.compile(rf"(?:{_pattern})\Z"), _first)


def dump(data: dict[str, Any]) -> str:
    """Plain data as YAML, in its own order."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=2**31, default_flow_style=False)


def compose(text: str, name: str) -> Node | None:
    """The node of the only document, or None where there is none.

    Args:
        text: without a byte order mark.
        name: of the source; every mark carries it.

    Raises:
        YamlError: if it is no YAML, or several documents.
    """
    try:
        loader = _Loader(text)
        loader.name = name
        return loader.get_single_node()
    except ReaderError as error:
        before = (text[: error.position] + "^").splitlines()
        place = len(before) - 1, len(before[-1]) - 1
        raise YamlError((*place, f"character {error.character:#x} is not allowed")) from error
    except yaml.MarkedYAMLError as error:
        raise YamlError(*_places(text, error)) from error
    except RecursionError as error:
        raise YamlError((0, 0, "nested too deeply")) from error


def _places(text: str, error: yaml.MarkedYAMLError) -> list[tuple[int, int, str]]:
    mark = error.problem_mark or error.context_mark
    line, column = (mark.line, mark.column) if mark else (0, 0)
    problem = error.problem or str(error)
    if r"character '\t'" in problem:
        tabs = [
            (n, m.end() - 1) for n, m in enumerate(map(re.compile(r" *\t(?!\s*(#|$))").match, text.splitlines())) if m
        ]
        where = tabs if (line, column) in tabs else [(line, column)]
        return [(*place, "a tab; recipes take spaces") for place in where]
    if "but found another document" in problem:
        return [(line, column, "a second document begins; a recipe is one")]
    plainly = next((words for text, words in _PLAINLY.items() if text in problem), None)
    context = f" {error.context}" if error.context else ""
    return [(line, column, f"this is no YAML: {plainly or problem + context}")]


class Plain:
    """Nodes to plain data: dicts, lists, text, numbers, booleans and None.

    Args:
        complain: called with every node that has no place in a recipe; the data then hold :data:`BAD` for it.

    Attributes:
        places: by location, the node of the key (None in a list and at the root) and that of the value.
    """

    def __init__(self, complain: Complain) -> None:
        self.complain = complain
        self.places: dict[Location, tuple[Node | None, Node]] = {}
        self.count = 0
        self.open: set[int] = set()

    def __call__(self, node: Node, location: Location = (), key: Node | None = None) -> Any:
        """The data of a node; of keys that stand twice, the first."""
        self.places[location] = key, node
        self.count += 1
        if self.count > MOST_VALUES:
            if self.count == MOST_VALUES + 1:
                self.complain(node, f"more than {MOST_VALUES:,} values; a recipe is small")
            return BAD
        if id(node) in self.open:
            return self._bad(node, "an alias of what it stands in")
        if len(self.open) == DEEPEST:
            return self._bad(node, "nested too deeply")
        self.open.add(id(node))
        try:
            return self._value(node, location)
        finally:
            self.open.discard(id(node))

    def find(self, location: Location) -> tuple[Node | None, Node, bool]:
        """The nodes of key and value at a location; those of what holds it, and False, where nothing is written there."""
        depth = next(depth for depth in range(len(location), -1, -1) if location[:depth] in self.places)
        return (*self.places[location[:depth]], depth == len(location))

    def _value(self, node: Node, location: Location) -> Any:
        if isinstance(node, MappingNode) and node.tag == f"{CORE}map":
            return self._mapping(node, location)
        if isinstance(node, SequenceNode) and node.tag == f"{CORE}seq":
            return [self(item, (*location, index)) for index, item in enumerate(node.value)]
        if isinstance(node, ScalarNode) and node.tag.removeprefix(CORE) in (*_KINDS, "str"):
            return self._scalar(node)
        return self._bad(node, f"tag {node.tag.replace(CORE, '!!')} is not allowed; recipes hold plain values")

    def _mapping(self, node: MappingNode, location: Location) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for key, value in node.value:
            if not isinstance(key, ScalarNode):
                self.complain(key, "a key is a word, not a list or section")
            elif key.value in data:
                line = (self.places[(*location, key.value)][0] or node).start_mark.line + 1
                self.complain(key, f"{key.value}: stands twice, first in line {line}; keep one")
            else:
                data[key.value] = self(value, (*location, key.value), key)
        return data

    def _scalar(self, node: ScalarNode) -> Any:
        kind, text = node.tag.removeprefix(CORE), node.value
        if kind == "str":
            return text
        if not re.fullmatch(_KINDS[kind][0], text):
            return self._bad(node, f"{text!r} is no {kind}")
        if kind == "null":
            return None
        if kind == "bool":
            return text.lower() == "true"
        try:
            return _number(text.replace("_", ""))
        except ValueError:
            return self._bad(node, "a number of too many digits")

    def _bad(self, node: Node, message: str) -> Any:
        self.complain(node, message)
        return BAD


def _number(text: str) -> int | float:
    """A number; ``1e4`` is whole."""
    if text.startswith(("0o", "0x")):
        return int(text, 0)
    if re.fullmatch(r"[-+]?[0-9]+", text):
        return int(text)
    value = float(re.sub(r"\.(?=inf|nan)", "", text.lower()))
    whole = "." not in text and value.is_integer() and abs(value) < 2**53
    return int(value) if whole else value
