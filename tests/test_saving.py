"""Sampled images on disk: sheets, folders, and what the files say of themselves."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from liftkit.errors import UsageError
from liftkit.report.over_time import GAP, HEAD, LABEL, MOST, SIDE, add_column
from liftkit.report.saving import check_output, read_settings, save_images


def settings(count: int) -> list[dict[str, object]]:
    return [{"prompt": f"Ein Wal, 鯨 no. {index}!", "seed": 7 + index, "steps": 4} for index in range(count)]


@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
def test_a_sheet_holds_the_settings_of_all_images(tmp_path: Path, ending: str) -> None:
    images = torch.rand(3, 3, 8, 8) * 2 - 1
    (sheet,) = save_images(images, tmp_path / f"sheet.{ending}", settings(3))
    assert read_settings(sheet) == settings(3)
    with Image.open(sheet) as opened:
        assert opened.size == (28, 8)


def test_a_folder_gets_single_images_beside_a_sheet(tmp_path: Path) -> None:
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    first = save_images(images, f"{tmp_path}/new/", settings(2))
    assert [file.name for file in first] == ["000007-ein-wal-鯨-no-0.png", "000008-ein-wal-鯨-no-1.png", "sheet.png"]
    assert read_settings(first[1]) == settings(2)[1]
    again = save_images(images, tmp_path / "new", settings(2))
    assert again[0].name == "000007-ein-wal-鯨-no-0-2.png"
    assert all(file.exists() for file in first)


@pytest.mark.parametrize(
    ("output", "file", "what"),
    [
        ("one.png", "one.png", "2 images in {}"),
        ("~/home [x].png", "home/home [x].png", "2 images in {}"),
        ("bare", "bare/sheet.png", "2 images and sheet.png in the folder {}"),
    ],
)
def test_the_path_that_is_printed_is_that_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Callable[..., tuple[int, str, str]],
    output: str, file: str, what: str,
) -> None:  # fmt: skip
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    pipeline = SimpleNamespace(settings=lambda *given: {"steps": 4})
    monkeypatch.setattr("liftkit.models.loaded.load_pipeline", lambda *given, **more: pipeline)
    monkeypatch.setattr("liftkit.models.sampling.check_options", lambda *given: None)
    monkeypatch.setattr("liftkit.models.sampling.sample", lambda *given, **more: torch.zeros(2, 3, 8, 8))
    code, out, err = cli("sample", "demo", "-p", "a", "-n", "2", "-o", output)
    assert code == 0, err
    made = tmp_path / file
    assert made.is_file()
    place = made.parent if "folder" in what else made
    assert " ".join(out.split()).startswith(" ".join(what.format(place).split()))


def test_what_cannot_be_written_is_known_before(tmp_path: Path) -> None:
    for output, message in (
        (tmp_path / "x.gif", "unknown picture format"),
        (tmp_path / "missing" / "x.png", "no such folder"),
        (f"{tmp_path}/missing/inner/", "no such folder"),
    ):
        with pytest.raises(UsageError, match=message):
            check_output(output)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        check_output(tmp_path / "file")


def test_previews_over_time_are_one_picture(tmp_path: Path) -> None:
    path, prompts = tmp_path / "over-time.png", ["a red seven", "a text that is far too long for a line of its own"]
    made = {step: torch.full((2, 3, 8, 16), step / 10) for step in (2, 4, 6)}
    for step, images in made.items():
        add_column(path, step, images, prompts)
    whole = path.read_bytes()
    assert read_settings(path) == {"steps": [2, 4, 6], "prompts": prompts}
    with Image.open(path) as opened:
        assert opened.size == (LABEL + 3 * (SIDE + GAP), HEAD + 2 * (SIDE // 2 + GAP))
        shades = [opened.getpixel((LABEL + place * (SIDE + GAP) + 9, HEAD + 9)) for place in range(3)]
    assert shades == [(round(127.5 + 12.75 * step),) * 3 for step in made]
    for step in (4, 6):  # a run that goes on from step 2 makes them again
        add_column(path, step, made[step], prompts)
    assert path.read_bytes() == whole
    path.write_bytes(b"no picture")
    add_column(path, 8, made[6], prompts)
    add_column(path, 9, made[6], ["another", "prompt"])
    assert read_settings(path)["steps"] == [9]
    for step in range(10, 10 + MOST):
        add_column(path, step, made[6][:, :, :1, :1], ["another", "prompt"])
    assert len(read_settings(path)["steps"]) <= MOST
