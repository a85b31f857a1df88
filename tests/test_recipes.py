"""Recipes: what is written comes back, in YAML without surprises, and overrides win."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from liftkit.finetune.recipe import Recipe
from liftkit.finetune.recipe_yaml import compose, dump
from tests.recipes import SCHEMA, SMALL, load, written


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# What is written comes back.


def values(key: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Anything that a part of the schema allows."""
    if "$ref" in key:
        return values(SCHEMA["$defs"][key["$ref"].rpartition("/")[2]])
    if "anyOf" in key or "oneOf" in key:
        return st.one_of([values(choice) for choice in key.get("anyOf") or key["oneOf"]])
    if "enum" in key or "const" in key:
        return st.sampled_from(key.get("enum") or [key["const"]])
    if "prefixItems" in key:
        return st.tuples(*map(values, key["prefixItems"])).map(list)
    if "properties" in key:
        required = {name: values(part) for name, part in key["properties"].items() if name in key.get("required", ())}
        optional = {name: values(part) for name, part in key["properties"].items() if name not in required}
        return st.fixed_dictionaries(required, optional=optional)
    bounds = {"min_value": key.get("minimum"), "max_value": key.get("maximum")}
    text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12)
    return {
        "integer": st.integers(bounds["min_value"], key.get("maximum", 2**40)),
        "number": st.floats(
            key.get("exclusiveMinimum", bounds["min_value"]),
            key.get("exclusiveMaximum", bounds["max_value"]),
            exclude_min="exclusiveMinimum" in key,
            exclude_max="exclusiveMaximum" in key,
            allow_nan=False,
            allow_infinity=False,
        ),
        "boolean": st.booleans(),
        "null": st.none(),
        "string": text.filter(lambda value: bool(value.strip())),
        "array": st.lists(values(key["items"]), min_size=1, max_size=3) if "items" in key else st.nothing(),
        "object": st.dictionaries(text, st.floats(1e-6, 1e6), max_size=3),
    }[key["type"]]


def allowed(data: dict[str, Any]) -> dict[str, Any]:
    """The same, where values go together and paths are there."""
    data |= {
        "model": "demo",
        "adapter": None,
        "space": "pixel",
        "init": "pretrained",
        "save": "model",
        "trackers": ["wandb"],
    }
    data["data"] |= {"flip": 0.0, "crop": "lanczos"}
    data["micro_batch"] = data.get("micro_batch") and data.get("batch_size", 32)
    data.get("optimizer", {}).pop("decay_from", None)
    data.get("optimizer", {}).pop("betas", None)
    data.get("validation", {}).pop("quantiles", None)
    data.get("trainable", {}).pop("dropout", None)
    data.get("objective", {}).pop("perceptual", None)
    data.get("objective", {}).pop("terms", None)
    data.get("objective", {}).pop("repa", None)
    data.get("objective", {}).pop("reference_precision", None)
    if data.get("base", {}).get("offload") == "blocks":
        data["base"]["quantize"] = "none"
        data |= {"gradient_checkpointing": True, "compile": False}
    if data.get("base", {}).get("quantize"):
        data["trainable"] = {**data.get("trainable", {}), "mode": "lora"}
    data.get("ema", {}).pop("decay", None)
    if data.get("precision") == "fp16":
        data.get("optimizer", {}).pop("name", None)
    if "validation" in data:
        data["validation"]["images"] = 8 + (data["validation"].get("images") or 0)
    for source in data["data"]["sources"]:
        source |= {"folder": {"path": "."}, "webdataset": {"urls": ["."]}}.get(source["kind"], {})
        if source["kind"] == "dataset":
            source["path"] = f"org/{source['path']}"
    return data


@settings(max_examples=60, deadline=None)
@given(data=values(SCHEMA).map(allowed))
def test_a_recipe_reads_again_as_itself(data: dict[str, Any]) -> None:
    recipe = Recipe.model_validate(data)
    assert load(recipe.to_yaml()) == recipe


@settings(max_examples=200, deadline=None)
@example(text="\x85")
@example(text="a\u2028b\u2029 \ufeff")
@given(
    text=st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
    | st.from_regex(r"[-+0-9._eExo:~]{1,8}", fullmatch=True)
)
def test_any_text_stays_text(text: str) -> None:
    node = compose(dump({"key": text}), "0")
    assert node is not None
    value = node.value[0][1]
    assert (value.tag, value.value) == ("tag:yaml.org,2002:str", text)


def test_other_readers_of_yaml_read_what_is_written_alike() -> None:
    import yaml

    recipe = load(SMALL, "precision=no", "previews.prompts=['on', '1e-4', '2020-01-01', '12:30']")
    assert yaml.safe_load(recipe.to_yaml()) == recipe.model_dump(mode="json")


def test_defaults() -> None:
    recipe = load(SMALL)
    assert recipe == Recipe(model="demo", output="run", data={"sources": [{"kind": "demo"}]})  # type: ignore[arg-type]
    assert recipe.output == Path("run")
    assert (recipe.trainable.rank, recipe.noise.shift, recipe.objective.kappa) == (256, 17.0, 0.3)
    with pytest.raises(ValidationError):
        recipe.steps = 3


# YAML.


@pytest.mark.parametrize(
    ("path", "text", "value"),
    [
        ("optimizer.learning_rate", "1e-4", 1e-4),
        ("optimizer.learning_rate", "1E-4", 1e-4),
        ("optimizer.learning_rate", ".5", 0.5),
        ("optimizer.learning_rate", "+2.", 2.0),
        ("optimizer.clip", "1_000.5", 1000.5),
        ("optimizer.clip", "~", None),
        ("optimizer.clip", "", None),
        ("steps", "1e4", 10_000),
        ("steps", "1_000", 1000),
        ("steps", "012", 12),
        ("steps", "0x10", 16),
        ("steps", "0o10", 8),
        ("precision", "no", "no"),
        ("compile", "True", True),
        ("model", "'demo'", "demo"),
        ("model", "!!str demo", "demo"),
        (
            "previews.prompts",
            "[yes, off, 2020-01-01, 12:30:00, '7', a b]",
            ("yes", "off", "2020-01-01", "12:30:00", "7", "a b"),
        ),
        ("previews.prompts", "[&a x, *a]", ("x", "x")),
    ],
)
def test_yaml_is_that_of_version_1_2(path: str, text: str, value: object) -> None:
    found = load(written(path, text)).value(path)
    assert (found, type(found)) == (value, type(value))


# Overrides.


def test_overrides() -> None:
    Path("photos").mkdir()
    recipe = load(
        f"{SMALL}ema:\noptimizer: {{multipliers: {{x: 2}}}}\n",
        "steps=1e2",
        "steps=200",
        "ema.gamma=3",
        "data.sources.0.count=5",
        "data.resolution=null",
        "optimizer.multipliers.norm_out.linear=5",
        "previews.prompts=[a, 'b=c']",
        "validation={images: 9, every: 3}",
        "model=demo",
    )
    assert (recipe.steps, recipe.ema.gamma, recipe.validation.images) == (200, 3.0, 9)
    assert recipe.optimizer.multipliers == {"x": 2, "norm_out.linear": 5}
    assert recipe.previews.prompts == ("a", "b=c")
    assert recipe.data.sources[0].model_dump() == {"kind": "demo", "weight": 1.0, "count": 5}
    changed = load(SMALL, "data.sources.0={kind: folder, path: photos}", "data.sources.0.weight=2")
    assert changed.data.sources[0].model_dump() == {
        "kind": "folder",
        "weight": 2.0,
        "path": Path("photos"),
        "captions": "files",
        "repeats": False,
        "reference_column": None,
    }


def test_an_override_leaves_aliases_alone() -> None:
    text = "model: demo\noutput: run\ndata: {sources: [&d {kind: demo}, *d, *d]}\n"
    recipe = load(text, "data.sources.1.weight=3")
    assert [source.weight for source in recipe.data.sources] == [1, 3, 1]
