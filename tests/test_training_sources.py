"""Where training data come from: folders, shards, datasets."""

from __future__ import annotations

import hashlib
import io
import json
import os
import sys
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from PIL import Image

from liftkit.data import demo
from liftkit.data.captioned import CaptionedFolder, DemoCaptioned, HubDataset, WebDataset
from liftkit.errors import UsageError
from liftkit.tally import Tally
from tests.training_data import SIDE, Encoders, Notes, fill, folder, picture, prepare, training

__all__ = ["folder"]


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


def test_classes_of_shards(tmp_path: Path) -> None:
    with shard(tmp_path / "part.tar", "w") as add:
        for index in range(3):
            add(f"{index}.png", encoded(index))
            add(f"{index}.cls", str(2 - index).encode())
    assert [WebDataset(f"{tmp_path}/part.tar").caption(index) for index in range(3)] == ["2", "1", "0"]


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
