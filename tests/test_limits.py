"""Nothing waits without end, and nothing eats memory without a limit."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from liftkit.checkpoint import components, header
from liftkit.checkpoint.header import read_header
from liftkit.checkpoint.model import find_model
from liftkit.cli.app import run
from liftkit.conversion.plan import make_plan
from liftkit.embedded import TINY_KLEIN
from liftkit.errors import UsageError
from liftkit.finetune.recipe_file import load_recipe
from liftkit.lift import Lift
from liftkit.models import load
from liftkit.models.chat import limit_template
from liftkit.options import ConvertOptions

FILES = [
    "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json", "text_encoder/config.json", "vae/config.json",
    "scheduler/scheduler_config.json", "transformer/config.json", "text_encoder/model.safetensors", "model_index.json",
]  # fmt: skip


@pytest.fixture
def model(tmp_path: Path) -> Path:
    shutil.copytree(TINY_KLEIN, tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_no_file_of_a_model_is_a_pipe_or_a_device(name: str, kind: str, model: Path, tmp_path: Path) -> None:
    (model / name).unlink()
    if kind == "pipe":
        os.mkfifo(model / name)
    else:
        (model / name).symlink_to("/dev/zero")
    with pytest.raises(UsageError):
        make_plan(str(model), tmp_path / "out", ConvertOptions(images="demo", device="cpu"))
    with pytest.raises(UsageError):
        load.load_pipeline(find_model(str(model)))


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_lifts_and_recipes_are_regular_files(kind: str, tmp_path: Path) -> None:
    for name, read in (("lift.safetensors", Lift.load), ("recipe.yaml", lambda path: load_recipe(str(path)))):
        if kind == "pipe":
            os.mkfifo(tmp_path / name)
        else:
            (tmp_path / name).symlink_to("/dev/zero")
        with pytest.raises(UsageError, match="regular file"):
            read(tmp_path / name)


def test_files_beside_the_weights_are_small(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(components, "MOST_BYTES", 5000)
    with pytest.raises(UsageError, match=r"tokenizer\.json: \d+ bytes, 5000 at most"):
        make_plan(str(model), tmp_path / "out", ConvertOptions(images="demo", device="cpu"))


def test_headers_are_parsed_once_and_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "w.safetensors"
    save_file({f"t{index}": torch.empty(0) for index in range(50)}, path, {"a": "b" * 1000})
    assert read_header(path) is read_header(path)
    monkeypatch.setattr(header, "MOST_TENSORS", 49)
    header._parsed.cache_clear()
    with pytest.raises(UsageError, match="50 tensors in one file, 49 at most"):
        read_header(path)
    monkeypatch.setattr(header, "MOST_TENSORS", 50)
    monkeypatch.setattr(header, "MOST_METADATA", 1000)
    with pytest.raises(UsageError, match="more than 1000 characters of metadata"):
        read_header(path)


TEMPLATES = {
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}": "runs for more than",
    "{{ raise_exception('no\n\nway') }}": "chat template fails",
    "{% if %}": "chat template fails",
    "{{ ''.__class__.__mro__ }}": "chat template fails",
    "{{ range(10 ** 9) }}": "chat template fails",
    "{{ messages[7].content }}": "chat template fails",
    "{{ 1 / 0 }}": "chat template fails",
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_chat_templates_end_or_are_refused_on_one_line(template: str) -> None:
    tokenizer = load.load_component(find_model("demo"), "tokenizer")
    del tokenizer.apply_chat_template
    limit_template(tokenizer, Path("tokenizer"), seconds=0.5)
    tokenizer.chat_template = template
    began = time.monotonic()
    with pytest.raises(UsageError, match=TEMPLATES[template]) as found:
        tokenizer.apply_chat_template([{"role": "user", "content": "a red seven"}], tokenize=False)
    assert time.monotonic() - began < 20
    assert "\n" not in str(found.value)


def test_templates_of_loaded_pipelines_are_limited_and_work(model: Path) -> None:
    config = json.loads((model / "tokenizer" / "tokenizer_config.json").read_text())
    pipeline: Any = load.load_pipeline(find_model(str(model)))
    messages = [{"role": "user", "content": "a red seven"}]
    assert "a red seven" in pipeline.tokenizer.apply_chat_template(messages, tokenize=False)
    template = "{{ raise_exception('no') }}"
    for file in (model / "tokenizer").glob("chat_template*"):
        file.unlink()
    (model / "tokenizer" / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    pipeline = load.load_pipeline(find_model(str(model)))
    with pytest.raises(UsageError, match=r"tokenizer: its chat template fails \(TemplateError: no\)"):
        pipeline.tokenizer.apply_chat_template(messages, tokenize=False)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [("transformer", "num_layers", 10**9), ("transformer", "num_layers", 10**400), ("text_encoder", "num_hidden_layers", 10**6)],
)  # fmt: skip
def test_no_more_layers_than_tensors(name: str, key: str, value: int, model: Path) -> None:
    path = model / name / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(UsageError, match=f"{name}/config.json: {key} is 10"):
        load.load_pipeline(find_model(str(model)))


def test_whatever_a_library_raises_about_files_is_one_line(model: Path) -> None:
    # huggingface_hub's checks of configs raise a class of their own, straight from Exception.
    path = model / "text_encoder" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "layer_types": ["full_attention"]}))
    with pytest.raises(UsageError, match="cannot be loaded"):
        load.load_pipeline(find_model(str(model)))


@pytest.mark.parametrize("arguments", [["-n", "1000000000"], ["--steps", "1000000000"], ["--seed", f"1{'0' * 30}"],
                                       ["--height", "1000000000"], ["--guidance", "nan"], ["--guidance", "inf"]])  # fmt: skip
def test_numbers_on_the_command_line_have_ends(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        sys, "argv", ["liftkit", "sample", "demo", "-p", "x", *arguments, "-o", str(tmp_path / "s.png")]
    )
    with pytest.raises(SystemExit) as found:
        run()
    assert found.value.code == 2
    assert arguments[0] in capsys.readouterr().err
    assert not (tmp_path / "s.png").exists()


def test_a_lack_of_memory_is_no_fault(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise MemoryError("Unable to allocate 7.28 TiB")

    monkeypatch.setattr("liftkit.cli.app.app", refuse)
    with pytest.raises(SystemExit) as found:
        run()
    assert found.value.code == 1
    assert "no memory left (Unable to allocate 7.28 TiB)" in capsys.readouterr().err
