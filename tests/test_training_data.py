"""Training data: a pure order, caches that are filled once, and what happens when files are broken."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from liftkit.color import to_signed
from liftkit.data.buckets import assign_buckets, bucket_sizes, nearest_bucket
from liftkit.data.cache import TensorCache
from liftkit.data.captioned import CaptionedFolder, DemoCaptioned
from liftkit.data.order import Mixture
from liftkit.errors import LiftkitError, UsageError
from tests.training_data import SIDE, Encoders, assert_same, embedding, fill, folder, picture, prepare, training

__all__ = ["folder"]


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
