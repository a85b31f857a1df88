"""Names out of model_index.json, and what cards take from other people's: data, whatever it says."""

from __future__ import annotations

import ast
import inspect
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import transformers
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from liftkit.checkpoint.card import front_matter, plain_name, source_header
from liftkit.checkpoint.classes import check_classes, pipeline_parts
from liftkit.checkpoint.model import find_model
from liftkit.conversion.card import pipeline_file
from liftkit.conversion.plan import make_plan
from liftkit.embedded import TINY_KLEIN
from liftkit.errors import UsageError
from liftkit.models.loaded import load_pipeline
from liftkit.options import ConvertOptions

INDEX = json.loads((TINY_KLEIN / "model_index.json").read_text())


@pytest.fixture
def model(tmp_path: Path) -> Path:
    shutil.copytree(TINY_KLEIN, tmp_path / "model")
    return tmp_path / "model"


def edit(model: Path, **changes: Any) -> None:
    (model / "model_index.json").write_text(json.dumps({**INDEX, **changes}))


NO_PIPELINES = [
    None, 5, ["pipeline", "Own"], {}, "", "DoesNotExistPipeline", "DiffusionPipeline", "AutoPipelineForText2Image",
    "Flux2Transformer2DModel", "os", "Flux2KleinPipeline ", "Flux2KleinPipeline\nimport os", "diffusers.Flux2KleinPipeline",
    "__import__", "Flux2KleinPipeline#", "X\x1b[2J", "\uff26lux2KleinPipeline", "StableDiffusionPipeline",
]  # fmt: skip


@pytest.mark.parametrize("name", NO_PIPELINES)
def test_what_is_no_pipeline_of_this_model_is_refused_in_the_plan(name: Any, model: Path, tmp_path: Path) -> None:
    edit(model, _class_name=name)
    with pytest.raises(UsageError, match="_class_name") as found:
        make_plan(str(model), tmp_path / "out", ConvertOptions(images="demo", device="cpu"))
    assert "\n" not in str(found.value)
    assert "\x1b" not in str(found.value)


@pytest.mark.parametrize(
    "entry",
    [
        ["os", "system"], ["antigravity", "X"], ["transformers", "Trainer"], ["transformers", "AutoTokenizer"],
        ["transformers", "Qwen3Config"], ["transformers", "NoSuchModel"], ["transformers", None], [None, "Qwen3Model"],
        ["my_module", "Encoder"], ["..", "X"], ["diffusers", "utils"], ["liftkit", "convert"], ["", ""],
    ],
)  # fmt: skip
def test_components_come_from_known_libraries_alone(entry: list[Any], model: Path, tmp_path: Path) -> None:
    edit(model, text_encoder=entry)
    with pytest.raises(UsageError, match=r"model_index.json: text_encoder is \["):
        make_plan(str(model), tmp_path / "out", ConvertOptions(images="demo", device="cpu"))
    with pytest.raises(UsageError, match=r"model_index.json: text_encoder is \["):
        load_pipeline(find_model(str(model)))


@pytest.mark.parametrize(
    "entry",
    [
        ["transformers", "Qwen3ForCausalLM"], ["transformers", "Qwen2TokenizerFast"], ["transformers", "T5EncoderModel"],
        ["transformers", "CLIPTextModelWithProjection"], ["transformers", "CLIPImageProcessor"],
        ["transformers", "PreTrainedTokenizerFast"], ["transformers", "Mistral3ForConditionalGeneration"],
        ["stable_diffusion", "StableDiffusionSafetyChecker"], ["diffusers", "AsymFlowMatchEulerDiscreteScheduler"],
        ["diffusers", "PixelAutoencoder"], [None, None], [1, 2],
    ],
)  # fmt: skip
def test_what_pipelines_are_made_of_is_known(entry: list[Any]) -> None:
    check_classes({**INDEX, "part": entry}, Path("model_index.json"))
    if entry[0] == "transformers":
        assert hasattr(transformers, entry[1])


def test_pipelines_are_those_of_diffusers_and_their_arguments_are_right() -> None:
    for name in ("Flux2KleinPipeline", "StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline", "FluxPipeline"):
        pipeline = getattr(diffusers, name)
        assert issubclass(pipeline, diffusers.DiffusionPipeline)
        found = pipeline_parts(name)
        assert found is not None
        assert found[0] == name
        assert found[1] == tuple(inspect.signature(pipeline.__init__).parameters)[1:]


def test_nothing_is_imported_to_look_names_up() -> None:
    program = f"""
import sys
from pathlib import Path
from liftkit.checkpoint.classes import check_classes
check_classes({INDEX!r}, Path("x"))
print({{"torch", "diffusers", "transformers"}} & sys.modules.keys())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100, check=True)
    assert done.stdout.strip() == "set()"


@settings(deadline=None, max_examples=60)
@given(st.one_of(st.text(), st.sampled_from(sorted(dir(diffusers))), st.sampled_from([str(n) for n in NO_PIPELINES])))
def test_pipeline_py_holds_a_name_of_diffusers_or_is_not_written(name: str) -> None:
    try:
        text = pipeline_file(name)
    except UsageError:
        return
    assert text == pipeline_file("Flux2KleinPipeline").replace("Flux2KleinPipeline", name)
    assert [type(node) for node in ast.parse(text).body] == [ast.Expr, ast.Import, ast.Import, ast.ClassDef]
    found = getattr(diffusers, name)
    assert "dummy" in found.__module__ or issubclass(found, diffusers.DiffusionPipeline)


CARDS = {
    "license: apache-2.0": {"license": "apache-2.0"},
    "license: other\nlicense_name: flux-dev\nlicense_link: LICENSE.md": {
        "license": "other", "license_name": "flux-dev", "license_link": "LICENSE.md",
    },
    "license: 'a\n\n  b: c'": {},
    "license: [mit, gpl]\nlicense_name: 3": {"license_name": "3"},
    "license: <script>alert(1)</script>": {},
    "license_link: javascript:alert(1)": {},
    "license_link: https://example.com/a?b=c": {"license_link": "https://example.com/a?b=c"},
    "license_name: '[x](http://x) `y`'": {},
    "a: &a [*a, *a]\nlicense: *a": {},
    "license: mit\n\tbroken": {},
    "- license": {},
    "license: \x1b[2J": {},
}  # fmt: skip


@pytest.mark.parametrize("text", CARDS)
def test_licenses_are_plain_text_or_left_out(text: str, tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    card.write_text(f"---\n{text}\n---\n# Model")
    assert source_header(card) == CARDS[text]
    header = front_matter(source_header(card)).removeprefix("---\n").removesuffix("---\n")
    known = {"library_name": "diffusers", "tags": ["pixel-diffusion", "flow-matching", "asymflow", "liftkit"]}
    assert yaml.load(header, yaml.BaseLoader) == CARDS[text] | known


@given(st.text())
def test_names_in_cards_mean_nothing_to_a_page(name: str) -> None:
    plain = plain_name(name)
    assert not set(plain) & set("`*[]<>#|\\\"'{}$&\n\r:()!~\x1b\x9b")
    assert len(plain) <= 200


def test_a_hostile_folder_name_and_card_stay_text(tmp_path: Path) -> None:
    from liftkit.conversion.execute import convert

    model = tmp_path / "x`: {}\n---\n<b onclick=a>"
    shutil.copytree(TINY_KLEIN, model)
    (model / "README.md").write_text("---\nlicense: mit\nlicense_name: <b>\n---\n<script>")
    out = tmp_path / "out"
    convert(str(model), out, ConvertOptions(images="demo", num_images=16, device="cpu", proof="projections"))
    card = (out / "README.md").read_text()
    assert "<" not in card
    assert card.splitlines().count("---") == 2
    assert yaml.safe_load(card.split("---\n")[1])["license"] == "mit"
    assert "<b " not in (out / "alignment.html").read_text()
