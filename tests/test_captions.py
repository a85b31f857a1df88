"""Which caption belongs to which picture, in folders and in tar files; and what is said of those that belong to none."""

from __future__ import annotations

import json
import os
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from liftkit.data.captioned import CaptionedFolder, WebDataset
from liftkit.data.captions import plain_name
from liftkit.data.metadata import Metadata, read_metadata
from liftkit.data.picture_files import MASK
from liftkit.data.training import TrainingData
from liftkit.errors import UsageError
from liftkit.tally import Tally


def draw(path: Path, color: str = "red") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), color).save(path)


def captions(source: CaptionedFolder | WebDataset) -> dict[str, str]:
    return {source.label(index): source.caption(index) for index in range(len(source))}


def prepare(source: Any, cache: Path) -> tuple[TrainingData, list[str]]:
    """Prepare training data, and the notes on them."""
    notes: list[str] = []

    class Notes:
        def stage(self, *_: Any) -> Any:
            from contextlib import nullcontext

            return nullcontext(lambda amount: None)

        def note(self, text: str) -> None:
            notes.append(text)

        def status(self, text: str) -> None: ...

    data = TrainingData(
        [(source, 1.0)], resolution=16, multiple=8, buckets=False, batch_size=2, seed=0, prompt_dropout=0.0,
        cache=cache, workers=1,
    )  # fmt: skip
    data.prepare(None, "", lambda: lambda prompts: {"x": torch.zeros(len(prompts), 1)}, "text", Notes())
    return data, notes


def test_files_beside_pictures(tmp_path: Path) -> None:
    texts = {
        "a.png": ("a.txt", "one"),
        "b.png": ("b.TXT", "two"),
        "c.jpg": ("c.caption", "three"),
        "d.png": ("d.png.txt", "four"),
        "e.png": ("e.json", json.dumps({"caption": "five"})),
        "x/café.png": (unicodedata.normalize("NFD", "x/café.txt"), "six"),
        "g.v2.png": ("g.v2.txt", "seven"),
    }
    for picture, (text, content) in texts.items():
        draw(tmp_path / picture)
        (tmp_path / text).write_text(content)
    (tmp_path / "a.caption").write_text("not taken: .txt goes first")
    (tmp_path / "a.TXT").write_text("not taken: endings in small letters go first")
    source = CaptionedFolder(tmp_path)
    found = captions(source)
    assert [found[name] for name in texts] == ["one", "two", "three", "four", "five", "six", "seven"]
    assert source.texts[1].left_out == {"beside another one that is taken": {"a.TXT": None, "a.caption": None}}


def test_masks_of_other_trainers_are_no_pictures(tmp_path: Path) -> None:
    masks = {"a-masklabel.png", "a-condlabel.png", "b_mask.jpg", "x/c-MASK.png"}
    for name in {"a.png", "b.png", "x/c.webp", "d_mask.png", "x/_mask.png", *masks}:
        draw(tmp_path / name)
    source = CaptionedFolder(tmp_path)
    assert set(captions(source)) == {"a.png", "b.png", "x/c.webp", "d_mask.png", "x/_mask.png"}
    assert set(source.tally.left_out[MASK]) == masks


def test_where_a_file_stops_being_text_is_named(tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_bytes(b"file_name,text\na.png,caf\xe9\n")
    with pytest.raises(UsageError, match="at byte 24"):
        CaptionedFolder(tmp_path)


def test_text_in_every_encoding(tmp_path: Path) -> None:
    contents = ["café".encode(), "café".encode("utf-8-sig"), "café".encode("utf-16"), "café\r\n".encode()]
    for number, content in enumerate(contents):
        draw(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_bytes(content)
    assert set(captions(CaptionedFolder(tmp_path)).values()) == {"café"}


def test_captions_that_are_no_text_are_all_named_and_their_pictures_are_not_blamed(tmp_path: Path) -> None:
    bad = {"1.txt": b"caf\xe9", "2.txt": "wide".encode("utf-16-le"), "3.json": b"{'python': 1}", "4.txt": b"\x92"}
    for number in range(6):
        draw(tmp_path / "images" / f"{number}.png")
        (tmp_path / "images" / f"{number}.txt").write_text("fine")
    for name, content in bad.items():
        (tmp_path / "images" / name).with_suffix(".txt").unlink()
        (tmp_path / "images" / name).write_bytes(content)
    with pytest.raises(UsageError) as caught:
        prepare(CaptionedFolder(tmp_path / "images"), tmp_path / "cache")
    assert all(name in str(caught.value) for name in bad)
    assert "0.txt" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("images/a.png", "images/a.png"),
        ("images\\a.png", "images/a.png"),
        ("./images//a.png", "images/a.png"),
        ("other/../images/a.png", "images/a.png"),
        (unicodedata.normalize("NFD", "images/é.png"), "images/é.png"),
        ("/mnt/elsewhere/images/a.png", "images/a.png"),
        ("C:\\Users\\me\\set\\images\\a.png", "images/a.png"),
        ("/mnt/b/same.png", "b/same.png"),
        ("/mnt/same.png", None),
        ("/mnt/images/gone.png", None),
        ("a.png", None),
        ("../images/a.png", None),
        ("", None),
    ],
)
def test_names_in_metadata(name: str, found: str | None) -> None:
    known = ["images/a.png", "images/é.png", "a/same.png", "b/same.png"]
    table = Metadata(known, Tally("lines of metadata"))
    table.add("", iter([(1, {"file_name": name, "text": "x"})]), "metadata.jsonl")
    assert [picture for picture in known if table.of(picture)] == ([found] if found else [])
    assert (table.lines.used, table.lines.lost) == ((1, 0) if found else (0, 1))


def test_metadata_lines_are_accounted_for(tmp_path: Path) -> None:
    for name in ("a.png", "sub/b.png", "sub/c.png", "d.png"):
        draw(tmp_path / name)
    rows = [
        {"file_name": "a.png", "text": "old"},
        {"file_name": "a.png", "text": "new\u2028line"},
        {"file_name": "gone.png", "text": "x"},
        {"file_name": "d.png", "description": "of another name"},
        {"file_name": "sub/b.png", "text": "outer"},
        {"file_name": "/x/sub/c.png", "text": "tail"},
        {"file_name": "/y/sub/c.png", "text": "another tail"},
    ]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "metadata.jsonl").write_text(text, encoding="utf-16")
    (tmp_path / "sub" / "metadata.csv").write_text('file_name;text\r\nb.png;"inner; of\ntwo lines"\r\n')
    source = CaptionedFolder(tmp_path)
    assert captions(source) == {
        "a.png": "new\u2028line", "d.png": "", "sub/b.png": "inner; of\ntwo lines", "sub/c.png": "tail"
    }  # fmt: skip
    lines = source.texts[0]
    assert (lines.found, lines.used) == (8, 4)
    assert [len(names) for names in lines.left_out.values()] == [1, 1, 1, 1]
    assert "metadata.jsonl:3 gone.png" in lines.summary()


def test_a_long_metadata_file_is_read_as_a_stream(tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    with (tmp_path / "metadata.jsonl").open("w") as file:
        for number in range(3000):
            file.write(json.dumps({"file_name": f"{number}.png", "text": "x" * 20}) + "\n")
        file.write(json.dumps({"file_name": "a.png", "text": "found", "embedding": "y" * 3_000_000}) + "\n")
    source = CaptionedFolder(tmp_path)
    assert captions(source) == {"a.png": "found"}
    assert (source.texts[0].found, len(source.texts[0].left_out["that name no picture here"])) == (3001, 20)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.csv", "name,caption\na.png,x\n"),
        ("metadata.csv", "file_name,text\na.png,x,y,z\n"),
        ("metadata.csv", ""),
        ("metadata.csv", "file_name,text\ra.png,x\r"),
        ("metadata.csv", 'file_name,text\na.png,"x\nb.png,y\n'),
        ("metadata.csv", 'file_name,text\na.png,"x \\"y\\" z"\n'),
        ("metadata.jsonl", "[]\n"),
        ("metadata.jsonl", '{"file_name": 3}\n'),
        ("metadata.jsonl", "[" * 100_000),
        ("metadata.jsonl", "a\0b"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": "\\ud800"}'),
    ],
)
def test_metadata_that_cannot_be_read_are_named(tmp_path: Path, name: str, content: str) -> None:
    draw(tmp_path / "a.png")
    (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=name.replace(".", r"\.")):
        CaptionedFolder(tmp_path)


def test_pipes_are_not_waited_for(tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    for name in ("metadata.jsonl", "a.txt"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(UsageError, match="no regular file"):
            captions(CaptionedFolder(tmp_path))
        (tmp_path / name).unlink()
    (tmp_path / "metadata.csv").symlink_to("/dev/zero")
    with pytest.raises(UsageError, match="no regular file"):
        CaptionedFolder(tmp_path)


@pytest.mark.parametrize("name", ["meta_cap.json", "captions.csv", "caption_0.txt", "labels.tsv"])
def test_without_any_caption_though_files_of_them_are_there_nothing_is_trained(tmp_path: Path, name: str) -> None:
    draw(tmp_path / "images" / "a.png")
    (tmp_path / "images" / name).write_text("{}")
    with pytest.raises(UsageError, match=name.replace(".", r"\.")):
        prepare(CaptionedFolder(tmp_path / "images"), tmp_path / "cache")
    (tmp_path / "images" / name).rename(tmp_path / name)
    (tmp_path / "images" / "README.txt").write_text("about these pictures")
    _, notes = prepare(CaptionedFolder(tmp_path / "images"), tmp_path / "cache")
    assert notes == ["images: 1 of 1 images have no caption"]


def test_accounts_say_what_was_found_used_and_left_out(tmp_path: Path) -> None:
    draw(tmp_path / "images" / "a.png")
    draw(tmp_path / "images" / "b.png")
    draw(tmp_path / "images" / ".c.png")
    (tmp_path / "images" / "b.png").write_bytes(b"<html>")
    (tmp_path / "images" / "a.txt").write_text("a caption")
    (tmp_path / "images" / "z.txt").write_text("a caption of nothing")
    data, _ = prepare(CaptionedFolder(tmp_path / "images"), tmp_path / "cache")
    images, files = (tally.to_json() for tally in data.tallies())
    assert (images["what"], images["found"], images["used"]) == ("images", 3, 1)
    assert {each["reason"] for each in images["left_out"]} == {"hidden, or another program's", "HTML, not a picture"}
    assert (files["what"], files["found"], files["used"]) == ("caption files", 2, 1)
    assert data.describe()["tallies"] == [images, files]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("metadata.csv", "sep=;\nfile_name;text\na.png;red\n", "red"),
        ("metadata.csv", "\n\nfile_name,text\na.png,red\n", "red"),
        ("metadata.csv", 'file_name, text\na.png, "red, ""big"""\n', 'red, "big"'),
        ("a.json", '{"text": "", "caption": "red"}', "red"),
        ("a.json", '{"caption": {"en": "red"}}', ""),
        ("a.txt", "\ufeff\ufeffred", "red"),
        ("a.tags", "red", ""),
    ],
)
def test_what_spreadsheets_and_trainers_write(tmp_path: Path, name: str, content: str, expected: str) -> None:
    draw(tmp_path / "a.png")
    (tmp_path / name).write_text(content)
    source = CaptionedFolder(tmp_path)
    assert captions(source) == {"a.png": expected}
    assert expected or source.texts[1].lost == 1


# Hostile text


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(["jsonl", "csv"]), st.text(max_size=200), st.booleans())
def test_any_lines_of_metadata_are_read_or_refused(kind: str, text: str, headed: bool) -> None:
    text = f"file_name,text\n{text}" if headed and kind == "csv" else text
    table = Metadata(["a.png"], Tally("lines of metadata"))
    try:
        table.add("", read_metadata(kind, iter(text.splitlines(keepends=True)), "metadata"), "metadata")
    except UsageError as error:
        assert str(error).startswith("metadata")


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60))
def test_any_name_is_compared(name: str) -> None:
    assert plain_name(plain_name(name)) == plain_name(name)
    table = Metadata(["a.png", "b/a.png"], Tally("lines of metadata"))
    table.add("b", iter([(1, {"file_name": name, "text": "x"})]), "metadata")
    assert table.lines.found == 1
