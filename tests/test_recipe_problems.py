"""What is wrong in a recipe is told, all at once and at its place."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from liftkit.errors import UsageError
from liftkit.finetune.recipe import Recipe
from liftkit.finetune.recipe_file import load_recipe
from tests.recipes import SMALL, keys, load, problems, refused, written


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# YAML.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"{SMALL}steps: 3\nsteps: 4\n", "recipe.yaml:5:1: steps: stands twice, first in line 4; keep one"),
        (f"{SMALL}---\nsteps: 4\n", "recipe.yaml:4:1: a second document begins; a recipe is one"),
        (f"{SMALL}ema:\n\tstart: 3\n", "recipe.yaml:5:1: a tab; recipes take spaces"),
        (f"{SMALL}steps: [3\n", "recipe.yaml:5:1: this is no YAML: expected ',' or ']', but got '<stream end>'"),
        (f"{SMALL}model: a: b\n", "recipe.yaml:4:9: this is no YAML: a ':' where no key can stand; put text"),
        (f"{SMALL}ema:\n  start: 3\n   gamma: 3\n", "recipe.yaml:6:9: this is no YAML: a ':' where no key can stand"),
        (f"{SMALL}ema:\n  start: 3\n gamma: 3\n", "recipe.yaml:6:2: this is no YAML: indented unlike what it should stand"),
        (f"{SMALL}stray\nsteps: 3\n", "recipe.yaml:5:1: this is no YAML: a line without ':' among keys"),
        (f"{SMALL}steps: *n\n", "recipe.yaml:4:8: this is no YAML: found undefined alias 'n'"),
        (f"{SMALL}steps: !!python/name:os.system 3\n", "recipe.yaml:4:8: tag !!python/name:os.system is not allowed"),
        (f"{SMALL}steps: !n 3\n", "recipe.yaml:4:8: tag !n is not allowed; recipes hold plain values"),
        (f"{SMALL}steps: !!int x\n", "recipe.yaml:4:8: 'x' is no int"),
        (f"{SMALL}steps: {'9' * 5000}\n", "recipe.yaml:4:8: a number of too many digits"),
        (f"{SMALL}? [a]\n: 3\n", "recipe.yaml:4:3: a key is a word, not a list or section"),
        (f"{SMALL}trackers: &t [*t]\n", "recipe.yaml:4:11: an alias of what it stands in"),
        (f"{SMALL}trackers: {'[' * 40}{']' * 40}\n", "recipe.yaml:4:40: nested too deeply"),
        (f"{SMALL}trackers: {'[' * 4000}", "recipe.yaml:1:1: nested too deeply"),
        (f"{SMALL}steps: \a3\n", "recipe.yaml:4:8: character 0x7 is not allowed"),
        ("- model\n", "recipe.yaml:1:1: a recipe is made of keys and values, such as model: demo"),
    ],
)  # fmt: skip
def test_what_is_no_recipe_yaml(text: str, expected: str) -> None:
    assert [line for line in problems(text) if line.startswith(expected)]


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_damage_is_reported_at_a_place_in_the_text(data: st.DataObject) -> None:
    text = Recipe(model="demo", output="run", data={"sources": [{"kind": "demo"}]}).to_yaml()  # type: ignore[arg-type]
    for _ in range(data.draw(st.integers(1, 3))):
        place, gone = data.draw(st.integers(0, len(text))), data.draw(st.integers(0, 9))
        new = data.draw(
            st.text("[]{}:,-#&*!|>'\"%@ \n\t?~.9aé\x07\u2028", max_size=3)
            | st.sampled_from(["data", "kind", "*a", "&a "])
        )
        text = text[:place] + new + text[place + gone :]
    try:
        load(text)
    except UsageError as error:
        lines = [*text.splitlines(), ""]
        places = re.findall(r"^recipe\.yaml:(\d+):(\d+): ", str(error), re.MULTILINE)
        assert places
        assert all(1 <= int(column) <= len(lines[int(line) - 1]) + 1 for line, column in places)


def test_every_tab_is_reported() -> None:
    assert len(problems(f"{SMALL}ema:\n\tstart: 3\n\tgamma: 3\n\t# no matter\n")) == 2


def test_aliases_cannot_grow_without_bound() -> None:
    lines = [
        "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]",
        *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)),
    ]
    assert any("more than 20,000 values" in line for line in problems("\n".join(lines)))


def test_a_blank_recipe_lacks_what_is_required() -> None:
    for text in ("", "# nothing\n", "---\n"):
        assert [line.partition(":1: ")[2].partition(",")[0] for line in problems(text)] == [
            "data: required",
            "model: required",
            "output: required",
        ]


# What is wrong is told at its place.


WRONG = """\
# A recipe in which everything is wrong.
modle: demo
output: run
steps: many
batch_size: 32
micro_batch: 5
compile: yes
lr: 1e-3
trainable:
  mode: lorra
  dropout: 1.5
  rank: 64.5
optimizer: {betas: [0.9], multipliers: {proj_out: fast}, lerning_rate: 3}
ema:
data:
  sources:
    - {kind: foldr, path: x}
    - kind: folder
    - {kind: folder, path: fotos}
    - path: x
    - {kind: webdataset, urls: ["päckchen/{0..1}.tar", "http://x/y.tar"]}
previews: {prompts: [], count: null, seed: .inf}
trackers: [wandb, wandb]
"""

REPORT = """\
recipe.yaml: 25 problems
recipe.yaml:2:1: model: required, and missing: a converted folder, a latent one, a Hub id, `demo`, or `new` (see `network`)
  modle: demo
  ^
recipe.yaml:2:1: modle: unknown key; did you mean model?
  modle: demo
  ^^^^^
recipe.yaml:4:8: steps: expected a whole number, found 'many'
  steps: many
         ^^^^
recipe.yaml:6:14: micro_batch divides batch_size (found micro_batch 5, batch_size 32)
  micro_batch: 5
               ^
recipe.yaml:7:10: compile: expected true or false, found 'yes'; did you mean true?
  compile: yes
           ^^^
recipe.yaml:8:1: lr: unknown key; did you mean optimizer.learning_rate?
  lr: 1e-3
  ^^
recipe.yaml:10:9: trainable.mode: expected lora, full or head, found 'lorra'; did you mean lora?
    mode: lorra
          ^^^^^
recipe.yaml:11:12: trainable.dropout: expected less than 1, found 1.5
    dropout: 1.5
             ^^^
recipe.yaml:12:9: trainable.rank: expected a whole number, found 64.5
    rank: 64.5
          ^^^^
recipe.yaml:13:20: optimizer.betas: expected 2 values, found 1
  optimizer: {betas: [0.9], multipliers: {proj_out: fast}, lerning_rate: 3}
                     ^
recipe.yaml:13:51: optimizer.multipliers.proj_out: expected a number, found 'fast'
  optimizer: {betas: [0.9], multipliers: {proj_out: fast}, lerning_rate: 3}
                                                    ^^^^
recipe.yaml:13:58: optimizer.lerning_rate: unknown key; did you mean learning_rate?
  optimizer: {betas: [0.9], multipliers: {proj_out: fast}, lerning_rate: 3}
                                                           ^^^^^^^^^^^^
recipe.yaml:14:1: ema: expected a section of keys, found nothing
  ema:
  ^^^
recipe.yaml:17:14: data.sources.0.kind: expected demo, folder, webdataset or dataset, found 'foldr'; did you mean folder?
      - {kind: foldr, path: x}
               ^^^^^
recipe.yaml:18:7: data.sources.1.path: required, and missing: the folder
      - kind: folder
        ^
recipe.yaml:19:28: data.sources.2.path: no folder fotos; did you mean photos?
      - {kind: folder, path: fotos}
                             ^^^^^
recipe.yaml:20:7: data.sources.3.kind: required, and missing: demo, folder, webdataset or dataset
      - path: x
        ^
recipe.yaml:21:33: data.sources.4.urls.0: no file päckchen/0.tar
      - {kind: webdataset, urls: ["päckchen/{0..1}.tar", "http://x/y.tar"]}
                                  ^^^^^^^^^^^^^^^^^^^^^
recipe.yaml:21:56: data.sources.4.urls.1: http://x/y.tar: shards must be local files; fetch them first
      - {kind: webdataset, urls: ["päckchen/{0..1}.tar", "http://x/y.tar"]}
                                                         ^^^^^^^^^^^^^^^^
recipe.yaml:22:21: previews.prompts: expected at least 1, found 0
  previews: {prompts: [], count: null, seed: .inf}
                      ^
recipe.yaml:22:32: previews.count: expected a whole number, found nothing
  previews: {prompts: [], count: null, seed: .inf}
                                 ^^^^
recipe.yaml:22:44: previews.seed: expected a whole number, found inf
  previews: {prompts: [], count: null, seed: .inf}
                                             ^^^^
recipe.yaml:23:11: trackers: expected each name once
  trackers: [wandb, wandb]
            ^
override:7: noise.shft: unknown key; did you mean shift?
  noise.shft=3
        ^^^^
override:23: validation.quantiles is at most validation.images (found validation.quantiles 999, validation.images 4)
  validation.quantiles= 999
                        ^^^
"""


def test_all_that_is_wrong_is_reported_at_once() -> None:
    Path("photos").mkdir()
    report = refused(WRONG, "noise.shft=3", "validation.images=4", "validation.quantiles= 999")
    assert report.splitlines() == REPORT.splitlines()


@pytest.mark.parametrize(("path", "key"), list(keys()))
def test_a_wrong_value_is_reported_at_the_value(path: str, key: dict[str, Any]) -> None:
    # No key takes a list of a section and a list.
    text = written(path, "[[], {}]")
    found = problems(text)
    last = text.splitlines()[-1]
    at = rf"recipe\.yaml:{len(text.splitlines())}:(\d+): {re.escape(path)}\b"
    columns = [int(match[1]) for line in found if (match := re.match(at, line))]
    assert columns
    assert all(column > last.index(":") + 1 for column in columns)
    assert [line for line in found if not re.match(at, line)] == []


@pytest.mark.parametrize("path", [path for path, _ in keys()])
def test_a_misspelt_key_is_known(path: str) -> None:
    section, _, name = path.rpartition(".")
    misspelt = f"{name}{name[-1]}"
    found = problems(SMALL, f"{path}{name[-1]}=3")
    assert f"override:{len(section) + 1 + bool(section)}: {path}{name[-1]}: unknown key; did you mean {name}?" in found
    assert not any(misspelt in known for known, _ in keys())


@pytest.mark.parametrize(
    ("key", "meant"),
    [("learning_rate", "optimizer.learning_rate"), ("wd", "optimizer.weight_decay"), ("optimizer.clp", "clip")],
)  # fmt: skip
def test_a_misplaced_key_is_known(key: str, meant: str) -> None:
    assert problems(SMALL, f"{key}=3")[0].endswith(f"{key}: unknown key; did you mean {meant}?")


def test_long_lines_are_shown_about_the_spot() -> None:
    report = refused(f"{SMALL}previews: {{prompts: [{'x' * 400}], count: many, seed: 0, {' ' * 400}}}\n").splitlines()
    assert report[1].startswith("recipe.yaml:4:")
    assert max(map(len, report[2:])) < 120
    begin = report[3].index("^")
    assert report[2][begin : begin + 4] == "many"


def test_tabs_and_wide_characters_stand_above_the_caret() -> None:
    line, caret = refused('model: demo\noutput: run\ndata: {sources: [{kind: "デモ"}]}\n').splitlines()[-2:]
    assert caret == " " * line.index('"デモ"') + "^^^^^^"
    line, caret = refused(f'{SMALL}previews: {{prompts: ["日本\t"], count: many}}\n').splitlines()[-2:]
    before = line[: line.index("many")]
    assert caret == re.sub(r"[^\t]", " ", before.replace("日本", "日本语语")) + "^^^^"


# Overrides.


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("steps", "override:1: expected section.key=value"),
        ("=3", "override:1: expected section.key=value"),
        ("steps=", "override:7: expected section.key=value"),
        ("a..b=3", "override:7: expected section.key=value"),
        ("model.x=3", "override:7: x: what stands before it is no section"),
        ("data.sources.7.count=3", "override:14: 7: the list has items 0 to 0"),
        ("data.sources.x=3", "override:14: x: the list has items 0 to 0"),
        ("steps=[", "override:8: this is no YAML: expected the node content, but found '<stream end>' while parsing a flow node"),
        ("steps=many", "override:7: steps: expected a whole number, found 'many'"),
        ("output=3", "override:8: output: expected a path, found 3; put it in quotes"),
        ("dta.resolution=3", "override:1: dta: unknown key; did you mean data?"),
        ("data.sources.0.path=x", "override:16: data.sources.0.path: unknown key"),
    ],
)  # fmt: skip
def test_overrides_that_will_not_do(override: str, expected: str) -> None:
    assert [line for line in problems(SMALL, override) if line.startswith(expected)]


def test_overrides_are_checked_beside_a_file_that_is_no_yaml() -> None:
    assert [line.partition(":")[0] for line in problems("a: [\n", "steps", "steps=]")] == [
        "recipe.yaml",
        "override",
        "override",
    ]


# Files.


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("model: ./klein", "model: no folder ./klein; expected a folder"),
        ("model: phots/x/y", "model: no folder phots/x/y"),
        ("model: phots", "model: no folder phots; did you mean photos?"),
        ("model: file.tar", "model: expected a diffusers folder, file.tar is a file that holds no weights"),
        ("output: file.tar", "output: file.tar is a file; expected a folder"),
        ("output: ''", "output: expected a path, found ''"),
        ("data: {sources: [{kind: demo}], cache: file.tar}", "data.cache: file.tar is a file"),
        ("data: {sources: [{kind: folder, path: file.tar}]}", "data.sources.0.path: no folder file.tar"),
        ("data: {sources: [{kind: dataset, path: ./none}]}", "data.sources.0.path: no folder ./none"),
        ("data: {sources: [{kind: webdataset, urls: 'file{,2}.tar'}]}", "data.sources.0.urls: no file file2.tar"),
        ("data: {sources: [{kind: webdataset, urls: 'pipe:cat file.tar'}]}", "data.sources.0.urls.0: pipe:cat file.tar: shards"),
        ("data: {sources: []}", "data.sources: expected at least 1, found 0"),
        ("data: 3", "data: expected a section of keys, found 3"),
    ],
)  # fmt: skip
def test_paths_are_looked_at(line: str, expected: str) -> None:
    Path("photos").mkdir()
    Path("file.tar").touch()
    key = line.partition(":")[0]
    text = "".join(f"{kept}\n" for kept in SMALL.splitlines() if not kept.startswith(key)) + line
    found = problems(text)
    assert len(found) == 1
    assert f": {expected}" in found[0]


def test_paths_that_will_do() -> None:
    for name in ("photos", "pixel"):
        Path(name).mkdir()
    for name in ("a0.tar", "a1.tar"):
        Path(name).touch()
    shards = "{kind: webdataset, urls: 'a{0..1}.tar'}, {kind: webdataset, urls: ['*.tar']}"
    sources = f"[{{kind: folder, path: photos}}, {shards}, {{kind: dataset, path: mnist}}]"
    for model in ("pixel", "./pixel", "org/name"):
        recipe = load(SMALL, f"model={model}", f"data.sources={sources}", "output=~/run")
        assert recipe.output == Path.home() / "run"


def test_files_that_will_not_do(tmp_path: Path) -> None:
    Path("mine.yaml").write_text(SMALL)
    Path("wide.yaml").write_bytes(b"model: demo\noutput: \xff\n")
    Path("huge.yaml").write_bytes(b"#" * 2**20)
    for name, expected in {
        "mine": r"mine: no such recipe; did you mean mine\.yaml\?",
        "min.yaml": r"min\.yaml: no such recipe; did you mean mine\.yaml\?",
        "tiny-klien": "tiny-klien: no such recipe; did you mean tiny-klein?",
        "tiny-klein.yaml": "give its name alone, tiny-klein",
        "nothing-like-it": "shipped are flux1-dev, flux2-klein-4b, flux2-klein-9b",
        "wide.yaml": r"wide\.yaml:2: is no UTF-8 text",
        "huge.yaml": "larger than 256 KiB",
        str(tmp_path): "a recipe is a YAML file",
    }.items():
        with pytest.raises(UsageError, match=expected):
            load_recipe(name)
    Path("bom.yaml").write_bytes(b"\xef\xbb\xbf" + SMALL.replace("\n", "\r\n").encode())
    assert load_recipe(Path("bom.yaml")) == load(SMALL)
