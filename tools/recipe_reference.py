"""The reference of recipe keys in docs/recipes.md, made from the schema: ``python -m tools.recipe_reference``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from liftkit.finetune.recipe import SOURCES, Recipe
from liftkit.finetune.recipe_rules import IDLE, RULES

PAGE = Path(__file__).parents[1] / "docs" / "recipes.md"
MARK = "<!-- From here on made by python -m tools.recipe_reference -->\n"
TYPES = {"integer": "whole number", "number": "number", "boolean": "true, false", "string": "text", "null": "null"}
IN_VAIN = (
    "These keys have an effect with another one's value alone. A run and a dry run name those that are set in vain, unless what\n"
    "they describe was switched off by hand:"
)
BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


def reference() -> str:
    """All keys as tables, one per section, and the rules between them."""
    schema = Recipe.model_json_schema()
    parts = ["## Keys\n", "A key without a default has to be given. Sections may be left out, or given in part.\n"]
    sections = {name: key for name, key in schema["properties"].items() if "$ref" in key}
    plain = {name: key for name, key in schema["properties"].items() if name not in sections}
    parts.append(_table({**schema, "properties": plain}))
    for name, section in sections.items():
        held = schema["$defs"][_name(section)]
        parts += [f"### {name}\n", f"{held['description']}\n", _table(held)]
        for inner, member in _optional(schema, held).items():
            parts += [f"#### {name}.{inner}\n", f"{member['description']}\n", _table(member)]
        if name == "data":
            for kind, source in SOURCES.items():
                member = schema["$defs"][source.__name__]
                parts += [f"#### kind: {kind}\n", f"{member['description']}\n", _table(member)]
    laws = "\n".join(f"* {rule.law}" for rule in RULES)
    idle = "\n".join(f"* with {each.key} {each.when}: {', '.join(each.keys)}" for each in IDLE)
    return "\n".join([*parts, "### Between keys\n", f"{laws}\n", f"{IN_VAIN}\n", f"{idle}\n"])


def write() -> None:
    """Bring the page up to date."""
    PAGE.write_text(PAGE.read_text().partition(MARK)[0] + MARK + "\n" + reference())


def _optional(schema: dict[str, Any], section: dict[str, Any]) -> dict[str, Any]:
    """The sections within a section, by name."""
    references = {
        name: each for name, key in section["properties"].items() for each in key.get("anyOf", ()) if "$ref" in each
    }
    return {name: schema["$defs"][_name(each)] for name, each in references.items()}


def _name(reference: dict[str, Any]) -> str:
    return reference["$ref"].rpartition("/")[2]


def _table(section: dict[str, Any]) -> str:
    rows = ["| key | value | default | meaning |", "|---|---|---|---|"]
    for name, key in section["properties"].items():
        if "const" in key:
            continue
        default = key.get("default", "")
        default = default if isinstance(default, str) else json.dumps(default)
        default = f"`{default}`" if default else ""
        rows.append(f"| `{name}` | {_values(key)} | {default} | {key['description']} |")
    return "\n".join(rows) + "\n"


def _values(key: dict[str, Any]) -> str:
    """Type and range in words."""
    if "anyOf" in key:
        return " or ".join(map(_values, key["anyOf"]))
    if "$ref" in key:
        return "section"
    if "oneOf" in key.get("items", {}):
        return "list of sources"
    if "enum" in key:
        return ", ".join(f"`{value}`" for value in key["enum"])
    if "prefixItems" in key:
        return f"list of {len(key['prefixItems'])} {_values(key['prefixItems'][0])}"
    if key["type"] == "array":
        return f"list of {_values(key['items'])}"
    if key["type"] == "object":
        return f"by name, {_values(key['additionalProperties'])}"
    bounds = ", ".join(f"{sign} {_round(key[bound])}" for bound, sign in BOUNDS.items() if bound in key)
    kind = "path" if key.get("format") == "path" else TYPES[key["type"]]
    return f"{kind} {bounds}".strip()


def _round(bound: float) -> str:
    return "2^63" if bound == 2**63 else f"{bound:g}"


if __name__ == "__main__":
    write()
