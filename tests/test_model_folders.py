"""Names, variants and configs of model folders, local and on the Hub."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from shutil import copyfile

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from liftkit.checkpoint.model import STEM, ModelFolder, find_model, read_weights
from liftkit.errors import UsageError
from tests.safetensors_files import fill


def weigh(folder: Path, *names: str, shard: str = "") -> Path:
    """Files of one tensor each, called ``a``, and for an index the shard that it names."""
    for name in names:
        if name.endswith(".json"):
            (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": {"a": shard}}))
        else:
            save_file({"a": torch.zeros(2)}, folder / name)
    return folder


INDEX, SINGLE, VARIANT = (f"{STEM}{end}" for end in (".safetensors.index.json", ".safetensors", ".fp16.safetensors"))
VARIANT_INDEX, SHARD = f"{STEM}.safetensors.index.fp16.json", f"{STEM}-00001-of-00001.safetensors"
VARIANT_SHARD = f"{STEM}.fp16-00001-of-00001.safetensors"


@pytest.mark.parametrize(
    ("names", "shard", "expected"),
    [
        ((SINGLE,), "", (SINGLE, False, None)),
        ((SINGLE, VARIANT), "", (SINGLE, False, None)),
        ((INDEX, SHARD), SHARD, (SHARD, True, None)),
        ((INDEX, SHARD, SINGLE), SHARD, (SHARD, True, None)),
        ((INDEX, SHARD, VARIANT_INDEX, VARIANT_SHARD), SHARD, (SHARD, True, None)),
        ((SINGLE, VARIANT_INDEX, VARIANT_SHARD), VARIANT_SHARD, (SINGLE, False, None)),
        ((VARIANT,), "", (VARIANT, False, "fp16")),
        ((VARIANT_INDEX, VARIANT_SHARD), VARIANT_SHARD, (VARIANT_SHARD, True, "fp16")),
        ((VARIANT_INDEX, VARIANT_SHARD, VARIANT), VARIANT_SHARD, (VARIANT_SHARD, True, "fp16")),
    ],
)
def test_which_files_are_the_weights(
    names: tuple[str, ...], shard: str, expected: tuple[str, bool, str | None], tmp_path: Path
) -> None:
    weights = read_weights(weigh(tmp_path, *names, shard=shard))
    assert ([*weights.headers], weights.sharded, weights.variant) == ([expected[0]], *expected[1:])
    assert torch.equal(weights.read("a"), torch.zeros(2))
    assert weights.read("b") is None


def test_two_variants_leave_no_choice(tmp_path: Path) -> None:
    weigh(tmp_path, VARIANT, f"{STEM}.bf16.safetensors")
    with pytest.raises(UsageError, match="several variants"):
        read_weights(tmp_path)
    with pytest.raises(UsageError, match="nor an index"):
        read_weights(weigh(Path(tempfile.mkdtemp(dir=tmp_path)), VARIANT_SHARD, SHARD))


def test_a_model_s_name_holds_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "klein")
    (tmp_path / "klein" / "model_index.json").write_text('{"_class_name": "Flux2KleinPipeline"}')
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path / "klein")
    assert {find_model(name).name for name in ("~/klein", ".", "../klein", str(tmp_path / "klein"))} == {"klein"}
    assert ModelFolder(tmp_path, "org/name", {}).name == "org/name"
    with pytest.raises(UsageError, match="no such folder"):
        find_model("~nobody-of-this-name/klein")


@pytest.mark.parametrize(
    ("limit", "others", "expected"),
    [
        (12, {}, 12),
        (77, {"tokenizer_2": ["transformers", "T5TokenizerFast"]}, None),
        (77, {"tokenizer_2": [None, None]}, 77),
        (512, {}, None),
        (10**30, {}, None),
        (1e30, {}, None),
        (None, {}, None),
        ("12", {}, None),
    ],
)
def test_text_length(limit: object, others: dict[str, object], expected: int | None, tmp_path: Path) -> None:
    folder = ModelFolder(tmp_path, "m", {"tokenizer": ["transformers", "Qwen2Tokenizer"], **others})
    assert folder.text_length() is None
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps({"model_max_length": limit}))
    assert folder.text_length() == expected


@pytest.mark.parametrize(("size", "expected"), [(512, 512), ([768, 512], 768), (None, 1024), (..., 1024)])
def test_image_size(size: object, expected: int, tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(json.dumps({} if size is ... else {"sample_size": size}))
    assert ModelFolder(tmp_path, "m", {"vae": ["diffusers", "AutoencoderKL"]}).image_size() == expected


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], set[str]]:
    """A Hub with one repository; tells which files have been fetched."""
    files = (
        "transformer/config.json",
        "transformer/x.safetensors",
        "vae/config.json",
        "vae/x.safetensors",
        "vae/x.bin",
    )
    store, cache = tmp_path / "store", tmp_path / "cache"
    for name in (*files, "whole.safetensors", "LICENSE.md", "README.md", "_extra/a.json", "safety/x.safetensors"):
        (store / name).parent.mkdir(parents=True, exist_ok=True)
        (store / name).write_text("{}")
    parts = {"transformer": ["diffusers", "AutoModel"], "vae": ["diffusers", "AutoencoderKL"]}
    parts |= {"safety": [None, None], "_extra": ["a", "b"]}
    (store / "model_index.json").write_text(json.dumps({"_class_name": "Flux2KleinPipeline", **parts}))

    def snapshot_download(model: str, allow_patterns: list[str]) -> str:
        for path in (path for path in store.rglob("*") if path.is_file()):
            name = path.relative_to(store).as_posix()
            if any(fnmatch(name, pattern) for pattern in allow_patterns):
                (cache / name).parent.mkdir(parents=True, exist_ok=True)
                copyfile(path, cache / name)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return lambda: {path.relative_to(cache).as_posix() for path in cache.rglob("*") if path.is_file()}


def test_configs_are_fetched_and_checked_before_weights(hub: Callable[[], set[str]]) -> None:
    def refuse(folder: ModelFolder) -> None:
        assert folder.class_of("transformer") == "AutoModel"
        assert folder.config("vae") == {"_class_name": "AutoencoderKL"}
        raise UsageError("will not do")

    with pytest.raises(UsageError, match="will not do"):
        find_model("org/name", refuse)
    assert hub() == {"model_index.json", "transformer/config.json", "vae/config.json"}
    assert find_model("org/name").name == "org/name"
    whole = {"transformer/x.safetensors", "vae/x.safetensors", "README.md", "LICENSE.md"}
    assert hub() == whole | {"model_index.json", "transformer/config.json", "vae/config.json"}


@pytest.mark.parametrize("kind", ["HTTPError", "EntryNotFoundError", "HFValidationError", "OfflineModeIsEnabled"])
def test_errors_of_the_hub_are_one_line_with_all_their_advice(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(model: str, **choices: object) -> str:
        raise getattr(huggingface_hub.errors, kind)("401 Client Error.\n\nAccess is restricted. Please log in.")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(UsageError, match=r"401 Client Error. Access is restricted. Please log in.\)$"):
        find_model("org/name")
