"""Folders whose names begin with how often their images are seen."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from liftkit.data.captioned import CaptionedFolder
from liftkit.data.heldout import split
from liftkit.data.repeats import concepts
from liftkit.errors import UsageError
from liftkit.finetune.recipe import FolderSource
from liftkit.finetune.sources import make_source, weighted
from tests.training_data import Notes, picture, training


def photos(root: Path, **folders: int) -> Path:
    """So many pictures in each folder."""
    for seed, (name, count) in enumerate(folders.items()):
        (root / name).mkdir(parents=True)
        for index in range(count):
            picture(100 * seed + index).save(root / name / f"{index}.png")
    return root


def opened(path: Path, notes: Notes | None = None, **keys: Any) -> list[tuple[Any, float]]:
    source = FolderSource(kind="folder", path=path, **keys)
    return weighted(source, make_source(source), notes or Notes())


def test_images_are_seen_as_often_as_their_folders_say(tmp_path: Path) -> None:
    """Three of ten repeats and ten of one: an epoch of 40 has each of the former ten times, and each of the latter once."""
    photos(tmp_path / "photos", **{"10_red cup": 3, "1_cup": 10})
    data = training(
        *opened(tmp_path / "photos", repeats=True), cache=tmp_path / "cache", batch_size=4, prompt_dropout=0.0
    )
    seen: Counter[str] = Counter()
    for step in range(10):
        batch = data.batch(step)
        seen.update(data.sources[source].label(index) for source, index in batch.indices)
        for (source, _), caption in zip(batch.indices, batch.captions):
            assert caption == data.sources[source].name.partition("_")[2]
    assert {name: count for name, count in seen.items() if name.startswith("10_")} == {
        f"10_red cup/{index}.png": 10 for index in range(3)
    }
    assert sum(seen.values()) == 40
    assert len(seen) == 13
    assert (data.tally.used, data.tally.found) == (13, 13)


def test_captions_beside_images_go_before_the_folder_s_name(tmp_path: Path) -> None:
    root = photos(tmp_path / "photos", **{"2_a_cup": 3, "3_": 1, "4": 1})
    (root / "2_a_cup" / "0.txt").write_text("a cup, blue")
    (root / "metadata.jsonl").write_text('{"file_name": "2_a_cup/1.png", "text": "a cup, green"}')
    parts = opened(root, repeats=True)
    assert {part.name: [part.caption(index) for index in range(len(part))] for part, _ in parts} == {
        "photos/2_a_cup": ["a cup, blue", "a cup, green", "a_cup"],
        "photos/3_": [""],
        "photos/4": [""],
    }
    assert [part.caption(0) for part, _ in opened(root, repeats=True, captions="folders")] == ["a_cup", "", ""]
    # Files of captions are counted once for all parts.
    data = training(*parts, cache=tmp_path / "cache", ready=False)
    assert [(tally.what, tally.used) for tally in data.tallies()] == [("lines of metadata", 1), ("caption files", 2)]


def test_images_elsewhere_are_counted(tmp_path: Path) -> None:
    root = photos(tmp_path / "photos", **{"5_cup": 2, "0_never": 1, "spare": 2, "x_1": 1, "-3_cup": 1})
    picture(7).save(root / "loose.png")
    ((part, share),) = opened(root, repeats=True, weight=3.0)
    assert (len(part), share) == (2, 3.0)
    assert part.tally.left_out == {
        "in no folder that begins with its number of repeats, as 10_name": dict.fromkeys(
            ["-3_cup/0.png", "loose.png", "spare/0.png", "spare/1.png", "x_1/0.png"]
        ),
        "in a folder of 0 repeats": {"0_never/0.png": None},
    }


def test_a_folder_without_repeats_is_refused_and_one_with_them_is_noted(tmp_path: Path) -> None:
    plain = photos(tmp_path / "plain", cups=1)
    with pytest.raises(UsageError, match=r"plain: repeats: no image is in a folder .*10_name.*1 in no folder"):
        concepts(CaptionedFolder(plain))
    notes = Notes()
    assert [share for _, share in opened(plain, notes)] == [1.0]
    (tmp_path / "loose").mkdir()
    picture(0).save(tmp_path / "loose" / "1_cup.png")
    assert len(opened(tmp_path / "loose", notes)) == 1
    assert not notes.notes
    assert len(opened(photos(tmp_path / "named", **{"10_cup": 1, "2_man": 1}), notes)) == 1
    assert notes.notes == ["named: every image counts once; with repeats: true, those in 10_cup as its name says"]


def test_parts_are_held_out_each_by_itself(tmp_path: Path) -> None:
    train, apart, _ = split(opened(photos(tmp_path, **{"10_cup": 20, "1_man": 30}), repeats=True), None, 0)
    assert [(source.name.rpartition("/")[2], len(source)) for source, _ in train] == [("10_cup", 18), ("1_man", 27)]
    assert [source.caption(0) for source, _ in apart] == ["cup", "man"]
    assert torch.equal(apart[0][0].image(0, (16, 16)), train[0][0].source.image(apart[0][0].indices[0], (16, 16)))
