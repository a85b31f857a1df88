"""Training data: a pure order, caches that are filled once, and what happens when files are broken."""

from __future__ import annotations

import hashlib
import io
import json
import os
import sys
import tarfile
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from liftkit.color import to_signed
from liftkit.data import cache as cache_module
from liftkit.data import demo
from liftkit.data.batch import Batch
from liftkit.data.buckets import assign_buckets, bucket_sizes, nearest_bucket
from liftkit.data.cache import TensorCache
from liftkit.data.captioned import CaptionedFolder, CaptionedSource, DemoCaptioned, HubDataset, WebDataset
from liftkit.data.order import Mixture
from liftkit.data.training import TrainingData
from liftkit.errors import LiftkitError, UsageError
from liftkit.progress import Silent
from liftkit.tally import Tally

SIDE = 16


def picture(seed: int, height: int = SIDE, width: int = SIDE) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def fill(folder: Path, count: int, size: Callable[[int], tuple[int, int]] = lambda index: (SIDE, SIDE)) -> Path:
    folder.mkdir(exist_ok=True)
    for index in range(count):
        picture(index, *size(index)).save(folder / f"{index:03d}.png")
        (folder / f"{index:03d}.txt").write_text(f"caption {index % 5}\n")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Forty captioned images of 16 x 16."""
    return fill(tmp_path / "images", 40)


@dataclass
class Encoders:
    """A VAE and a text encoder that count."""

    calls: list[Tensor] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    interrupt_at: int | None = None

    def image(self) -> Callable[[Tensor], Tensor]:
        return self.encode

    def encode(self, images: Tensor) -> Tensor:
        if len(self.calls) == self.interrupt_at:
            raise KeyboardInterrupt
        self.calls.append(images)
        return F.avg_pool2d(images, 2)

    def prompt(self) -> Callable[[list[str]], dict[str, Tensor]]:
        return self.embed

    def embed(self, prompts: list[str]) -> dict[str, Tensor]:
        self.prompts += prompts
        return {"encoder_hidden_states": torch.stack([embedding(prompt) for prompt in prompts])}

    @property
    def images(self) -> int:
        """Different images that were encoded."""
        return len({image.numpy().tobytes() for call in self.calls for image in call})


def embedding(prompt: str) -> Tensor:
    seed = int(hashlib.sha256(prompt.encode()).hexdigest()[:8], 16)
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(seed)).bfloat16()


class Notes(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def training(
    *sources: CaptionedSource | tuple[CaptionedSource, float], cache: Path, ready: bool = True, **changes: Any
) -> TrainingData:
    choices = {
        "resolution": SIDE,
        "multiple": 4,
        "buckets": False,
        "batch_size": 4,
        "seed": 0,
        "prompt_dropout": 0.1,
        "workers": 2,
    }
    weighted = [source if isinstance(source, tuple) else (source, 1.0) for source in sources]
    data = TrainingData(weighted, cache=cache, **{**choices, **changes})
    if ready:
        prepare(data, Encoders())
    return data


def prepare(data: TrainingData, encoders: Encoders, vae: str = "vae", observer: Any = None) -> Tally:
    return data.prepare(encoders.image, vae, encoders.prompt, "text", observer)


def assert_same(a: Batch, b: Batch) -> None:
    assert torch.equal(a.images, b.images)
    assert a.latents is not None
    assert b.latents is not None
    assert torch.equal(a.latents, b.latents)
    assert a.prompts.keys() == b.prompts.keys()
    assert all(torch.equal(a.prompts[name], b.prompts[name]) for name in a.prompts)
    assert (a.captions, a.indices) == (b.captions, b.indices)


# Order.


@pytest.mark.parametrize("buckets", [False, True])
def test_a_resumed_run_and_several_processes_see_the_same_batches(tmp_path: Path, buckets: bool) -> None:
    source = CaptionedFolder(fill(tmp_path / "images", 23, lambda i: (16, (16, 24, 12)[i % 3])))
    choices: dict[str, Any] = {"buckets": buckets, "prompt_dropout": 0.3}
    mixed = [(source, 2.0), (DemoCaptioned(9), 1.0)]
    straight = list(training(*mixed, cache=tmp_path / "a", **choices).prefetch(0, 20))
    resumed = training(*mixed, cache=tmp_path / "b", workers=0, **choices)
    for step, batch in enumerate([*resumed.prefetch(0, 10), *resumed.prefetch(10, 20)]):
        assert_same(batch, straight[step])
        assert_same(resumed.batch(step), straight[step])
    halves = zip(resumed.prefetch(5, 8, slice(0, 2)), resumed.prefetch(5, 8, slice(2, 4)))
    for step, (first, second) in enumerate(halves, start=5):
        assert torch.equal(torch.cat([first.images, second.images]), straight[step].images)
        assert first.captions + second.captions == straight[step].captions
    other = training(*mixed, cache=tmp_path / "a", seed=1, **choices)
    assert other.batch(0).indices != straight[0].indices


def test_every_epoch_has_each_image_once_in_an_order_of_its_own(folder: Path, tmp_path: Path) -> None:
    data = training(CaptionedFolder(folder), cache=tmp_path / "cache")
    epochs = [[i for s in range(e, e + 10) for i in data.batch(s).indices] for e in (0, 10)]
    assert all(sorted(epoch) == [(0, index) for index in range(40)] for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert epochs[0] != sorted(epochs[0])


def test_sources_are_mixed_by_weight_at_any_time(tmp_path: Path) -> None:
    data = training((DemoCaptioned(50), 3.0), (DemoCaptioned(7, seed=1), 1.0), cache=tmp_path, workers=0)
    drawn = [source for step in range(40) for source, _ in data.batch(step).indices]
    for start in range(0, 160, 8):
        assert drawn[start : start + 8].count(0) == 6
    second = [index for step in range(28) for source, index in data.batch(step).indices if source == 1]
    assert Counter(second) == dict.fromkeys(range(7), 4)


@given(st.lists(st.floats(0.01, 100.0), min_size=1, max_size=5), st.integers(0, 3000))
def test_mixtures_count_what_came_before(weights: list[float], start: int) -> None:
    mixture = Mixture(weights, slots=1000)
    before = Counter(mixture.at(position)[0] for position in range(start))
    choice, rank = mixture.at(start)
    assert rank == before[choice]
    counts = Counter(mixture.at(position)[0] for position in range(1000))
    # Exact to a slot, but for choices so rare that they are given one.
    for index, weight in enumerate(weights):
        assert abs(counts[index] - 1000 * weight / sum(weights)) <= 1 + len(weights)


def test_prompt_dropout_puts_the_empty_prompts_embedding_in_place(folder: Path, tmp_path: Path) -> None:
    source = CaptionedFolder(folder)
    for chance, low, high in ((0.0, 0, 0), (1.0, 400, 400), (0.25, 70, 130)):
        data = training(source, cache=tmp_path / "cache", prompt_dropout=chance)
        dropped = 0
        for batch in data.prefetch(0, 100):
            for caption, (_, index), states in zip(
                batch.captions, batch.indices, batch.prompts["encoder_hidden_states"]
            ):
                assert caption in ("", source.caption(index))
                assert torch.equal(states, embedding(caption))
                dropped += caption == ""
        assert low <= dropped <= high


# What a batch holds.


def test_images_and_latents_belong_together(folder: Path, tmp_path: Path) -> None:
    source = CaptionedFolder(folder)
    batch = training(source, cache=tmp_path / "cache").batch(3)
    assert batch.images.shape == (4, 3, SIDE, SIDE)
    assert batch.images.dtype == torch.uint8
    for image, (_, index) in zip(batch.images, batch.indices):
        assert np.array_equal(image.numpy(), np.asarray(Image.open(source.files[index])).transpose(2, 0, 1))
    assert batch.latents is not None
    assert torch.allclose(batch.latents, F.avg_pool2d(to_signed(batch.images), 2), atol=1e-3)
    assert not torch.equal(batch.latents[0], batch.latents[1])


def test_without_an_image_encoder_there_are_no_latents_and_images_are_checked_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[int] = []
    original = CaptionedFolder.image
    monkeypatch.setattr(CaptionedFolder, "image", lambda s, i, size: decoded.append(i) or original(s, i, size))
    for expected in (40, 0):
        decoded.clear()
        data = training(CaptionedFolder(folder), cache=tmp_path / "cache", ready=False)
        data.prepare(None, "", Encoders().prompt, "text")
        assert len(decoded) == expected
        assert data.batch(0).latents is None


def test_latents_are_kept_in_half_precision_within_its_range(folder: Path, tmp_path: Path) -> None:
    source = CaptionedFolder(folder)
    for scale, dtype in ((1.0, torch.float16), (1e6, torch.float32)):
        data = training(source, cache=tmp_path / str(scale), ready=False)
        encode = partial(torch.mul, torch.tensor(scale))
        data.prepare(partial(lambda made: made, encode), "vae", Encoders().prompt, "text")
        cached = TensorCache(tmp_path / str(scale) / "latents", "vae")
        key = f"{source.key(0)}/{SIDE}x{SIDE}"
        assert cached.get(key)["latents"].dtype == dtype
        batch = data.batch(0)
        assert torch.allclose(batch.latents, to_signed(batch.images) * scale, rtol=1e-3, atol=1e-3)


def test_all_images_of_a_step_share_a_bucket_and_all_buckets_have_their_turn(tmp_path: Path) -> None:
    source = CaptionedFolder(fill(tmp_path / "images", 30, lambda i: ((40, 40), (30, 56), (60, 30))[i % 3]))
    data = training(source, cache=tmp_path / "cache", buckets=True, resolution=32, multiple=8)
    shapes, seen = Counter(), set()
    for batch in data.prefetch(0, 30):
        height, width = batch.images.shape[-2:]
        shapes[height, width] += 1
        assert height % 8 == width % 8 == 0
        for _, index in batch.indices:
            seen.add(index)
            assert nearest_bucket(*source.size(index), data.sizes) == (height, width)
    assert seen == set(range(30))
    assert sorted(shapes.values()) == [10, 10, 10]
    assert sum(data.describe()["sizes"].values()) == 30


# Buckets.


@given(st.integers(1, 80), st.sampled_from([4, 16, 32]), st.sampled_from([1.0, 1.5, 2.0, 3.0]))
def test_bucket_sizes_have_about_one_area(tokens: int, multiple: int, max_ratio: float) -> None:
    sizes = bucket_sizes(tokens * multiple, multiple, max_ratio)
    area = (tokens * multiple) ** 2
    assert (tokens * multiple, tokens * multiple) in sizes
    for height, width in sizes:
        assert height % multiple == width % multiple == 0
        assert (width, height) in sizes
        assert max(height / width, width / height) <= max_ratio
        assert abs(height * width - area) <= multiple * min(height, width) / 2


def test_the_nearest_bucket_and_rare_ones() -> None:
    buckets = bucket_sizes(512, 64)
    assert nearest_bucket(700, 700, buckets) == (512, 512)
    assert nearest_bucket(100, 1000, buckets) == min(buckets, key=lambda size: size[0] / size[1])
    assert nearest_bucket(300, 150, buckets) == nearest_bucket(150, 300, buckets)[::-1]
    sizes = [(512, 512)] * 9 + [(300, 150)] * 2 + [(150, 300)] * 5
    assert len(set(assign_buckets(sizes, buckets, 2))) == 3
    merged = assign_buckets(sizes, buckets, 4)
    assert merged[9] == merged[0]
    assert merged[11] != merged[0]
    assert set(assign_buckets(sizes, buckets, 99)) <= set(buckets)
    assert len(set(assign_buckets(sizes, buckets, 99))) == 1


# Caches.


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


# Broken files.


def test_corrupt_images_are_named_and_left_out(folder: Path, tmp_path: Path) -> None:
    raw = (folder / "004.png").read_bytes()
    (folder / "004.png").write_bytes(raw[: len(raw) // 2])
    (folder / "009.png").write_bytes(b"no picture")
    data = training(CaptionedFolder(folder), cache=tmp_path / "cache", ready=False)
    (folder / "020.png").write_bytes(b"<!DOCTYPE html><html>404</html>")
    tally = prepare(data, Encoders())
    reasons = {"truncated": ["004.png"], "text, not a picture": ["009.png"], "HTML, not a picture": ["020.png"]}
    assert {reason: list(names) for reason, names in tally.left_out.items()} == reasons
    assert (tally.found, tally.used) == (40, 37)
    seen = {index for batch in data.prefetch(0, 20) for _, index in batch.indices}
    assert seen == set(range(40)) - {4, 9, 20}
    again = training(CaptionedFolder(folder), cache=tmp_path / "cache", ready=False)
    assert prepare(again, Encoders()).left_out.keys() == tally.left_out.keys()
    assert again.describe() == data.describe()


def test_an_image_that_is_broken_below_its_header_changes_no_other_images_bucket_later(tmp_path: Path) -> None:
    """Buckets are chosen from images that can be decoded: a second run, which knows them, must agree with the first."""
    folder = fill(tmp_path / "images", 12, lambda i: (16, 32) if i < 4 else (16, 16))
    raw = (folder / "000.png").read_bytes()
    (folder / "000.png").write_bytes(raw[: len(raw) // 2])
    choices: dict[str, Any] = {"buckets": True, "batch_size": 4}
    first = training(CaptionedFolder(folder), cache=tmp_path / "cache", **choices)
    assert list(first.describe()["sizes"]) == ["16x16"]
    second = training(CaptionedFolder(folder), cache=tmp_path / "cache", **choices)
    for step in range(6):
        assert_same(first.batch(step), second.batch(step))


@pytest.mark.parametrize("change", [lambda path: path.unlink(), lambda path: picture(77).save(path)])
def test_an_image_that_went_away_gives_its_row_to_another(
    folder: Path, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    data = training(CaptionedFolder(folder), cache=tmp_path / "cache")
    before = data.batch(2)
    row = 1
    gone = before.indices[row][1]
    change(folder / f"{gone:03d}.png")
    after = data.batch(2)
    assert after.indices[row] == (0, (gone + 1) % 40)
    assert [name for names in data.tally.left_out.values() for name in names] == [f"{gone:03d}.png"]
    assert (data.tally.used, data.tally.lost) == (39, 1)
    assert after.latents is not None
    assert torch.allclose(after.latents, F.avg_pool2d(to_signed(after.images), 2), atol=1e-3)
    for other in {0, 1, 2, 3} - {row}:
        assert torch.equal(after.images[other], before.images[other])
    assert_same(next(data.prefetch(2, 3)), after)


def test_when_the_disk_is_gone_training_ends_with_a_line(folder: Path, tmp_path: Path) -> None:
    data = training(CaptionedFolder(folder), cache=tmp_path / "cache")
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(LiftkitError, match=r"images: none.*can be read any more"):
        list(data.prefetch(0, 3))


def test_a_source_without_any_usable_image(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"no picture")
    data = training(CaptionedFolder(tmp_path / "images"), cache=tmp_path / "cache", ready=False)
    with pytest.raises(UsageError, match=r"images: none of its 1 images.*a\.png"):
        prepare(data, Encoders())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resolution": 3}, "resolution 3"),
        ({"resolution": 3, "buckets": True}, "resolution 3"),
        ({"batch_size": 0}, "batch size 0"),
        ({"prompt_dropout": 1.5}, "prompt dropout 1.5"),
    ],
)
def test_numbers_out_of_range(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        training(DemoCaptioned(4), cache=tmp_path, ready=False, **changes)


def test_sources_and_weights_that_make_no_sense(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no source"):
        training(cache=tmp_path)
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="weight"):
            training((DemoCaptioned(4), weight), cache=tmp_path)
    with pytest.raises(UsageError, match="0 images"):
        DemoCaptioned(0)
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="no cache can be made"):
        training(DemoCaptioned(4), cache=tmp_path / "file")


# Sources.


def test_demo_images_are_drawn_as_they_are() -> None:
    source = DemoCaptioned(5, split="heldout", seed=3)
    image, scene = demo.image_at(2, split="heldout", seed=3)
    assert np.array_equal(source.image(2, (64, 64)).numpy(), image.transpose(2, 0, 1))
    assert source.caption(2) == scene.prompt
    assert source.key(2) == "demo/3/heldout/2"
    assert source.image(2, (32, 48)).shape == (3, 32, 48)


def test_folders_of_captions(tmp_path: Path) -> None:
    fill(tmp_path, 3)
    (tmp_path / "001.txt").unlink()
    (tmp_path / "002.txt").unlink()
    (tmp_path / "inner").mkdir()
    picture(9).save(tmp_path / "inner" / "deep.webp")
    lines = ({"file_name": "000.png", "text": "not this"}, {"file_name": "001.png", "text": " from metadata "})
    (tmp_path / "metadata.jsonl").write_text("\ufeff" + "\n\n".join(map(json.dumps, lines)))
    (tmp_path / "inner" / "metadata.jsonl").write_text(
        json.dumps({"file_name": "deep.webp", "caption": ["ein Bär", "b"]})
    )
    source = CaptionedFolder(tmp_path)
    assert [source.caption(index) for index in range(4)] == ["caption 0", "from metadata", "", "ein Bär"]
    notes = Notes()
    data = training(source, cache=tmp_path / "cache", ready=False, resolution=32)
    prepare(data, Encoders(), observer=notes)
    assert any("1 of 4 images have no caption" in note for note in notes.notes)
    assert any("4 of 4 images are smaller" in note for note in notes.notes)


def test_sizes_are_those_of_upright_pictures(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(0, 8, 16).save(tmp_path / "turned.jpg", exif=exif)
    picture(0, 8, 16).save(tmp_path / "turned.png", exif=exif)
    picture(0, 8, 16).save(tmp_path / "wide.png")
    source = CaptionedFolder(tmp_path)
    assert [source.size(index) for index in range(3)] == [(16, 8), (16, 8), (8, 16)]
    for index in range(3):
        height, width = source.size(index)
        with Image.open(source.files[index]) as file:
            upright = np.asarray(file) if index == 2 else np.rot90(np.asarray(file), -1)
        assert np.array_equal(source.image(index, (height, width)).numpy(), upright.transpose(2, 0, 1))


def test_images_are_resized_to_cover_and_cropped_about_the_center(tmp_path: Path) -> None:
    wide = Image.new("RGB", (60, 20), "black")
    wide.paste("white", (20, 0, 40, 20))
    wide.save(tmp_path / "wide.png")
    source = CaptionedFolder(tmp_path)
    assert (source.image(0, (10, 10)) > 230).all()
    left = source.image(0, (10, 30))
    assert left.shape == (3, 10, 30)
    assert (left[:, :, 15] > 250).all()
    assert (left[:, :, :8] < 5).all()


@pytest.mark.parametrize("line", ["{", "[1]", '{"text": "a"}', '{"file_name": 3}'])
def test_metadata_that_are_broken(tmp_path: Path, line: str) -> None:
    fill(tmp_path, 1)
    (tmp_path / "metadata.jsonl").write_text(f'{{"file_name": "a.png", "text": "b"}}\n{line}\n')
    with pytest.raises(UsageError, match=r"metadata\.jsonl:2: expected"):
        CaptionedFolder(tmp_path)


def test_folders_that_are_missing_or_empty(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        CaptionedFolder(tmp_path / "none")
    with pytest.raises(UsageError, match="no image files"):
        CaptionedFolder(tmp_path)


@contextmanager
def shard(path: Path, mode: str = "w") -> Iterator[Callable[[str, bytes], None]]:
    with tarfile.open(path, mode) as tar:

        def add(name: str, content: bytes) -> None:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))

        yield add


def encoded(seed: int) -> bytes:
    buffer = io.BytesIO()
    picture(seed).save(buffer, "PNG")
    return buffer.getvalue()


def make_shards(folder: Path) -> None:
    for number in range(3):
        with shard(folder / f"part-{number:03d}.tar") as add:
            for index in range(4):
                add(f"a/{index}.txt", f"text {number} {index}".encode())
                add(f"a/{index}.cls", b"3")
                add(f"a/{index}.png", encoded(10 * number + index))
            add("b/last.v1.png", b"of another kind")
            add("b/last.json", json.dumps({"caption": "from json"}).encode())
            add("b/last.PNG", encoded(10 * number + 9))
            add("b/lonely.txt", b"no image")


def test_webdataset_shards(tmp_path: Path) -> None:
    make_shards(tmp_path)
    source = WebDataset(f"{tmp_path}/part-{{000..001}}.tar")
    assert len(source) == 10
    assert [source.caption(index) for index in (0, 4, 6)] == ["text 0 0", "from json", "text 1 1"]
    assert source.label(6) == "part-001.tar:a/1.png"
    assert np.array_equal(source.image(6, (SIDE, SIDE)).numpy(), np.asarray(picture(11)).transpose(2, 0, 1))
    assert len(WebDataset(f"{tmp_path}/*.tar")) == len(
        WebDataset([f"{tmp_path}/part-00{{0,1}}.tar", tmp_path / "part-002.tar"])
    )
    data = training(source, cache=tmp_path / "cache")
    assert {index for batch in data.prefetch(0, 10) for _, index in batch.indices} == set(range(10))
    encoders = Encoders()
    make_shards(tmp_path)
    with shard(tmp_path / "part-000.tar", "a") as add:
        add("c/new.png", encoded(99))
    prepare(training(WebDataset(f"{tmp_path}/*.tar"), cache=tmp_path / "cache", ready=False), encoders)
    assert encoders.images == 6


def test_webdataset_shards_that_cannot_be_used(tmp_path: Path) -> None:
    make_shards(tmp_path)
    with tarfile.open(tmp_path / "packed.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "part-000.tar", "x.png")
    (tmp_path / "empty.tar").write_bytes(bytes(10240))
    for url, message in (
        ("none.tar", "no such shard"),
        ("part-{000..003}.tar", "part-003.tar: no such shard"),
        ("packed.tar.gz", r"compressed \(gzip\)"),
        ("empty.tar", "no image"),
    ):
        with pytest.raises(UsageError, match=message):
            WebDataset(f"{tmp_path}/{url}")
    with pytest.raises(UsageError, match="must be local"):
        WebDataset("https://example.org/a.tar")
    whole = (tmp_path / "part-000.tar").read_bytes()
    (tmp_path / "part-000.tar").write_bytes(whole[: whole.index(encoded(2)) + 100])
    with pytest.raises(UsageError, match=r"part-000\.tar.*unexpected end"):
        WebDataset(tmp_path / "part-000.tar")
    with shard(tmp_path / "part-001.tar", "a") as add:
        add("c/broken.png", encoded(2)[:100])
    data = training(WebDataset(tmp_path / "part-001.tar"), cache=tmp_path / "cache", ready=False)
    assert prepare(data, Encoders()).left_out == {
        "truncated": {"part-001.tar:c/broken.png": None},
        "further pictures of a sample": {"part-001.tar:b/last.v1.png": None},
    }


def test_datasets_that_are_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match="pip install datasets"):
        HubDataset("someone/something")


class Rows(list[Any]):
    """Rows as the package datasets has them, with the kinds of their columns."""

    features: ClassVar[dict[str, None]] = {"text": None}


def test_rows_of_a_dataset_without_a_caption_are_counted() -> None:
    source = HubDataset.__new__(HubDataset)
    source.name, source.caption_column = "few", "text"
    source.captions = Rows({"text": each} for each in ("a", "", None, {"no": "text"}))
    source.texts = [Tally("captions", used=4)]
    assert [source.caption(i) for i in (0, 1, 2, 2, 3)] == ["a", "", "", "", ""]
    assert source.texts[0].summary() == (
        "1 of 4 captions used; left out: 2 empty (few[1], few[2]); 1 no text but dict (few[3])"
    )


@pytest.mark.filterwarnings("ignore")  # what that package warns of is its own
def test_datasets_in_all_their_forms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    files = fill(tmp_path / "images", 6)
    rows = datasets.Dataset.from_dict(
        {"image": [str(files / f"{i:03d}.png") for i in range(6)], "text": [f"c {i}" for i in range(6)]}
    )
    rows.to_csv(tmp_path / "table.csv")
    rows = rows.cast_column("image", datasets.Image())
    rows.to_parquet(tmp_path / "table.parquet")
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(tmp_path / "two")
    for place in ("table.csv", "table.parquet", "one", "two"):
        source = HubDataset(tmp_path / place)
        assert len(source) == 6
        assert [source.caption(i) for i in range(6)] == [f"c {i}" for i in range(6)]
        assert np.array_equal(source.image(4, (SIDE, SIDE)).numpy(), np.asarray(picture(4)).transpose(2, 0, 1))
        assert source.key(4).rpartition("/")[2] == hashlib.sha256((files / "004.png").read_bytes()).hexdigest()
        assert source.stamp(4) == HubDataset(tmp_path / place).stamp(4) != source.stamp(5)
    alone = HubDataset(tmp_path / "two", split="test", caption_column=None)
    assert (len(alone), alone.texts) == (1, [])
    for changes, message in (
        ({"split": "none"}, "no split 'none'; it has train, test"),
        ({"caption_column": "texts"}, "did you mean 'text'"),
        ({"image_column": "img"}, "it has image, text"),
    ):
        with pytest.raises(UsageError, match=message):
            HubDataset(tmp_path / "two", **changes)
    with pytest.raises(UsageError, match="cannot load"):
        HubDataset(tmp_path / "table.csv", split="none")
    os.remove(files / "003.png")
    data = training(HubDataset(tmp_path / "table.csv"), cache=tmp_path / "cache", ready=False)
    assert prepare(data, Encoders()).left_out == {"gone": {"table.csv[3]": None}}
