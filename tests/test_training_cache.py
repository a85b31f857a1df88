"""Caches of training data: what fills them, what is kept, what is made anew."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from liftkit.data import cache as cache_module
from liftkit.data.cache import TensorCache
from liftkit.data.captioned import CaptionedFolder
from liftkit.errors import LiftkitError
from tests.training_data import Encoders, Notes, assert_same, folder, picture, prepare, training

__all__ = ["folder"]


def test_a_complete_cache_loads_no_encoder(folder: Path, tmp_path: Path) -> None:
    encoders = Encoders()
    prepare(training(CaptionedFolder(folder), cache=tmp_path / "cache", ready=False), encoders)
    assert encoders.images == 40
    assert Counter(encoders.prompts)["caption 3"] == 1
    assert set(encoders.prompts) == {"", *(f"caption {i}" for i in range(5))}

    def never() -> Any:
        raise AssertionError("loaded")

    data = training(CaptionedFolder(folder), cache=tmp_path / "cache", ready=False)
    data.prepare(never, "vae", never, "text")
    assert len(data.batch(0).indices) == 4
    (folder / "007.txt").write_text("a new caption")
    later = Encoders()
    data = training(CaptionedFolder(folder), cache=tmp_path / "cache", ready=False)
    data.prepare(never, "vae", later.prompt, "text")
    assert set(later.prompts) == {"a new caption", ""}


def test_the_image_encoder_is_let_go_before_the_prompt_encoder_is_made(folder: Path, tmp_path: Path) -> None:
    class Vae:
        def __call__(self, images: Tensor) -> Tensor:
            return images

    kept: list[weakref.ref[Vae]] = []

    def make_vae() -> Vae:
        vae = Vae()
        kept.append(weakref.ref(vae))
        return vae

    def make_text() -> Callable[[list[str]], dict[str, Tensor]]:
        assert len(kept) == 1
        assert kept[0]() is None
        return Encoders().embed

    training(CaptionedFolder(folder), cache=tmp_path, ready=False).prepare(make_vae, "vae", make_text, "text")


def test_only_a_changed_file_is_encoded_again(folder: Path, tmp_path: Path) -> None:
    first = training(CaptionedFolder(folder), cache=tmp_path / "cache")
    picture(99).save(folder / "005.png")
    (folder / "011.png").rename(folder / "renamed.png")
    encoders = Encoders()
    data = training(CaptionedFolder(folder), cache=tmp_path / "cache", ready=False)
    prepare(data, encoders)
    assert encoders.images == 1
    expected = torch.from_numpy(np.asarray(picture(99)).transpose(2, 0, 1) / 127.5 - 1.0).float()
    assert torch.allclose(encoders.calls[0][0], expected, atol=1e-6)
    assert data.describe()["digest"] != first.describe()["digest"]


def test_another_vae_or_text_encoder_encodes_all_again(folder: Path, tmp_path: Path) -> None:
    training(CaptionedFolder(folder), cache=tmp_path / "cache")
    encoders = Encoders()
    data = training(CaptionedFolder(folder), cache=tmp_path / "cache", ready=False)
    data.prepare(encoders.image, "another vae", encoders.prompt, "text")
    assert encoders.images == 40
    assert not encoders.prompts
    data.prepare(encoders.image, "vae", encoders.prompt, "another text encoder")
    assert encoders.images == 40
    assert len(set(encoders.prompts)) == 6


def test_an_interrupted_cache_goes_on_and_ends_the_same(folder: Path, tmp_path: Path) -> None:
    source = CaptionedFolder(folder)
    interrupted = training(source, cache=tmp_path / "cache", ready=False)
    with pytest.raises(KeyboardInterrupt):
        prepare(interrupted, Encoders(interrupt_at=1))
    rest = Encoders()
    prepare(interrupted, rest)
    assert rest.images == 40 - 16
    whole = training(source, cache=tmp_path / "other")
    for step in range(10):
        assert_same(whole.batch(step), interrupted.batch(step))


@pytest.mark.parametrize("damage", [lambda raw: raw[:-5], lambda raw: b"", lambda raw: b"\x80\x02" + raw[2:]])
def test_a_damaged_shard_is_found_and_made_anew(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[bytes], bytes]
) -> None:
    monkeypatch.setattr(cache_module, "SHARD_BYTES", 1)
    before = training(CaptionedFolder(folder), cache=tmp_path / "cache").batch(0)
    shards = sorted((tmp_path / "cache" / "latents").rglob("*.safetensors"))
    assert len(shards) == 3
    shards[1].write_bytes(damage(shards[1].read_bytes()))
    encoders, notes = Encoders(), Notes()
    data = training(CaptionedFolder(folder), cache=tmp_path / "cache", ready=False)
    prepare(data, encoders, observer=notes)
    assert 0 < encoders.images <= 16
    assert any("damaged" in note and shards[1].name in note for note in notes.notes)
    assert_same(data.batch(0), before)


def test_a_broken_table_of_files_costs_time_only(folder: Path, tmp_path: Path) -> None:
    before = training(CaptionedFolder(folder), cache=tmp_path).batch(0)
    (tmp_path / "files.json").write_text('{"layout": 3, "fi')
    encoders = Encoders()
    data = training(CaptionedFolder(folder), cache=tmp_path, ready=False)
    prepare(data, encoders)
    assert encoders.images == 0
    assert_same(data.batch(0), before)


def test_tensor_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = TensorCache(tmp_path, "one")
    entries = {f"a/{i}:b": {"x": torch.randn(i, 2).bfloat16(), "mask": torch.arange(i)} for i in range(5)}
    cache.add(entries)
    assert cache.missing(["new", "a/3:b", "new"]) == ["new"]
    assert not list(tmp_path.rglob("*.safetensors"))
    cache.flush()
    for opened in (cache, TensorCache(tmp_path, "one")):
        for key, tensors in entries.items():
            found = opened.get(key)
            assert found.keys() == tensors.keys()
            assert all(torch.equal(found[name], tensors[name]) for name in tensors)
            assert found["x"].dtype == torch.bfloat16
    assert TensorCache(tmp_path, "two").missing(entries) == list(entries)
    with pytest.raises(KeyError):
        cache.get("new")
    late = TensorCache(tmp_path, "one")
    monkeypatch.setattr(cache_module, "KEPT_BYTES", 1)
    late.get("a/1:b")
    late.get("a/2:b")
    next(tmp_path.rglob("*.safetensors")).unlink()
    # What was read before, up to so many bytes, is still in memory.
    assert torch.equal(late.get("a/1:b")["x"], entries["a/1:b"]["x"])
    with pytest.raises(LiftkitError, match="run again"):
        late.get("a/2:b")


def test_two_processes_may_fill_one_cache(tmp_path: Path) -> None:
    one, two = TensorCache(tmp_path, "same"), TensorCache(tmp_path, "same")
    one.add({"a": {"x": torch.zeros(1)}, "b": {"x": torch.ones(1)}})
    two.add({"b": {"x": torch.ones(1)}, "c": {"x": torch.ones(1)}})
    two.flush()
    one.flush()
    assert TensorCache(tmp_path, "same").missing("abcd") == ["d"]
    for cache in (one, two):
        cache.add({"d": {"x": torch.full((1,), 4.0)}})
    for cache in (one, two):
        cache.flush()
    assert all(cache.get("d")["x"].item() == 4.0 for cache in (one, two))


def test_encoders_that_break_their_word(folder: Path, tmp_path: Path) -> None:
    source = CaptionedFolder(folder)
    data = training(source, cache=tmp_path / "a", ready=False)
    with pytest.raises(LiftkitError, match="not finite"):
        data.prepare(lambda: lambda images: images / 0.0, "vae", Encoders().prompt, "text")
    data = training(source, cache=tmp_path / "b", ready=False)
    (folder / "000.txt").write_text("one more")
    prepare(data, Encoders())
    (folder / "000.txt").write_text("another one")
    with pytest.raises(LiftkitError, match=r"'another one'.*pad"):
        data.prepare(Encoders().image, "vae", lambda: lambda p: {"encoder_hidden_states": torch.zeros(8, 9, 4)}, "text")
