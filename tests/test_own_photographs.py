"""What finetuning makes of a folder of one's own photographs: held-out images, dry runs, tiny folders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from liftkit.data import demo
from liftkit.data.captioned import CaptionedFolder, DemoCaptioned
from liftkit.data.heldout import split
from liftkit.errors import UsageError
from tests.training import few_steps

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def forty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty photographs: 25 with captions, five smaller than 64 pixels; beside them a file that is none and half a one."""
    folder = tmp_path_factory.mktemp("forty") / "photos"
    folder.mkdir()
    for index in range(40):
        image = Image.fromarray(demo.image_at(index)[0])
        (image.resize((48, 48)) if index < 5 else image).save(folder / f"{index:02d}.png")
        if index >= 15:
            (folder / f"{index:02d}.txt").write_text("a seven")
    (folder / "note.png").write_text("no picture")
    (folder / "half.png").write_bytes((folder / "39.png").read_bytes()[:2000])
    return folder


@pytest.fixture
def place(forty: Path, pixel_klein: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with ``photos`` and the model ``pixel``."""
    shutil.copytree(forty, tmp_path / "photos")
    (tmp_path / "pixel").symlink_to(pixel_klein)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def keep(folder: Path, count: int) -> None:
    """Leave so many good photographs in a folder."""
    for path in folder.iterdir():
        if not path.stem.isdigit() or int(path.stem) >= count:
            path.unlink()


def test_a_tenth_of_a_folder_is_held_out_and_unreadable_files_do_not_count(forty: Path) -> None:
    source = CaptionedFolder(forty)
    train, apart, notes = split([(source, 1.0)], None, seed=0)
    # 41 files open, of which one breaks off inside.
    assert (len(train[0][0]), len(apart[0][0]), notes) == (38, 4, [])
    held = {apart[0][0].label(index) for index in range(4)}
    assert held & {"note.png", "half.png"} == set()
    assert held | {train[0][0].label(index) for index in range(38)} == {source.label(index) for index in range(42)}
    assert split([(source, 1.0)], None, seed=0)[1][0][0].describe() == apart[0][0].describe()


def test_at_most_256_are_held_out_and_of_each_source_at_most_a_tenth(forty: Path) -> None:
    _, apart, _ = split([(DemoCaptioned(5000), 3.0), (CaptionedFolder(forty), 1.0)], None, seed=0)
    assert [len(source) for source, _ in apart] == [192, 4]


def test_a_number_that_is_too_large_is_an_error_that_says_what_to_do(place: Path, cli) -> None:
    code, _, stderr = cli("finetune", "tiny-klein", *few_steps("run", validation__every=1, validation__images=256))
    assert (code, stderr.count("\n")) == (2, 2)
    assert "256 of the 41 images of photos would be held out, half at most; leave it out to hold out a tenth" in stderr
    assert not (place / "run").exists()
    with pytest.raises(UsageError, match="21 of the 41 images"):
        split([(CaptionedFolder(place / "photos"), 1.0)], 21, seed=0)


@pytest.mark.parametrize("count", [1, 2, 9])
def test_a_tiny_folder_trains_without_validation_and_says_so(place: Path, cli, count: int) -> None:
    keep(place / "photos", count)
    code, stdout, stderr = cli("finetune", "tiny-klein", *few_steps("run", validation__every=1, steps=1))
    assert code == 0, stderr
    assert f"photos: {count} images are too few to hold a tenth out" in stderr
    assert "no validation" in stderr
    assert "1 of 1" in stdout
    assert not any("validation" in line for line in (place / "run" / "log.jsonl").read_text().splitlines())


def test_the_natural_first_finetune_on_own_photographs_runs(place: Path, cli) -> None:
    code, _, stderr = cli("finetune", "tiny-klein", *few_steps("run", validation__every=1, steps=1))
    assert code == 0, stderr
    record = json.loads((place / "run" / "run.json").read_text())
    assert [part["images"] for part in record["data"]] == [36, 4]
    # The whole recipe is in the run folder.
    assert "images: null" in (place / "run" / "recipe.yaml").read_text()


def test_a_dry_run_counts_what_it_found_in_about_twenty_lines(place: Path, cli) -> None:
    arguments = ("finetune", "tiny-klein", *few_steps("run", validation__every=1, steps=100), "--dry-run")
    code, stdout, stderr = cli(*arguments)
    assert code == 0, stderr
    lines = [" ".join(line.split()) for line in stdout.splitlines() if line.strip()]
    assert len(lines) <= 24
    assert "found 42 in photos: 36 to train on, 4 held out for validation" in lines
    (left_out,) = [line for line in lines if line.startswith("left out")]
    assert left_out.startswith("left out 2 images: ")
    assert "note.png" in left_out
    assert "half.png" in left_out
    (captions,) = [line for line in lines if line.startswith("captions")]
    with_one, without = int(captions.split()[1]), int(captions.split()[4])
    assert with_one + without == 36
    assert without in range(11, 16)
    (enlarged,) = [line for line in lines if line.startswith("enlarged")]
    assert enlarged.split()[1] in "12345"
    (time,) = [line for line in lines if line.startswith("time about")]
    assert "for 100 steps" in time
    assert time.endswith("s a step, measured here on cpu")
    assert "sources:" not in stdout
    assert not (place / "run").exists()
    code, stdout, _ = cli(*arguments, "--show-recipe")
    assert "sources:\n" in stdout


def test_sizes_are_named_where_files_are_too_many_to_decode(place: Path, cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("liftkit.finetune.dry_run.DECODED", 10)
    code, stdout, stderr = cli("finetune", "tiny-klein", *few_steps("run", steps=100), "--dry-run")
    assert code == 0, stderr
    (trained,) = [line.split() for line in stdout.splitlines() if line.startswith("trained at")]
    assert trained[2:5] == ["64", "x", "64"]
    assert "opened, not decoded" in " ".join(stdout.split())


def test_what_would_take_too_long_to_measure_is_estimated_and_says_so(
    place: Path, cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("liftkit.finetune.needs.MEASURED", 0.0)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, stdout, stderr = cli("finetune", "tiny-klein", *few_steps("run"), "--dry-run")
    assert code == 0, stderr
    assert "not measured on this CPU; estimated at" in stdout


def test_previews_carry_step_and_prompt_and_validation_is_on_screen(place: Path, cli) -> None:
    from liftkit.report.saving import read_settings

    changes = {"previews": {"every": 1, "count": 2, "steps": 2, "prompts": ["a red seven", "x" * 300]}}
    code, _, stderr = cli("finetune", "tiny-klein", *few_steps("run", validation__every=1, **changes))
    assert code == 0, stderr
    pictures = sorted((place / "run" / "previews").iterdir())
    assert [path.name for path in pictures] == ["over-time.png", "step-0000001.png", "step-0000002.png"]
    assert read_settings(pictures[2]) == [
        {"prompt": "a red seven", "seed": 0, "step": 2},
        {"prompt": "x" * 300, "seed": 1, "step": 2},
    ]
    with Image.open(pictures[1]) as opened:
        # Two pictures of 64 pixels, twice as large, with a title and captions.
        assert opened.size == (2 * 128 + 4, 22 + 128 + 30)
        title, caption = opened.crop((0, 0, 260, 22)), opened.crop((0, 152, 128, 180))
        assert all(len(part.getcolors(1 << 20) or []) > 4 for part in (title, caption))
    assert "note: step 1: preview run/previews/step-0000001.png" in stderr
    assert "note: step 2: error on held-out images" in stderr
    assert "before)" in stderr


def test_the_result_of_a_run_is_called_as_the_run_is(tmp_path: Path) -> None:
    from liftkit.evaluate.entries import _name

    model = tmp_path / "photos" / "model"
    model.mkdir(parents=True)
    assert _name(model, "model") == "model"
    (tmp_path / "photos" / "run.json").write_text("{}")
    assert _name(model, "model") == "photos"
    assert _name(tmp_path / "photos", "photos") == "photos"


def test_the_demo_writes_its_images_as_a_folder_to_train_on(cli: Cli, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    code, out, _ = cli("demo", "--images", "3", "-o", folder)
    assert (code, "3 images with captions" in out) == (0, True)
    source = CaptionedFolder(folder)
    assert [source.label(index) for index in range(len(source))] == ["000000.png", "000001.png", "000002.png"]
    image, scene = demo.image_at(2)
    assert np.array_equal(np.asarray(Image.open(folder / "000002.png")), image)
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    assert json.loads(lines[2]) == {"file_name": "000002.png", "text": scene.prompt}
    code, _, err = cli("demo", "--images", "3", "-o", folder)
    assert (code, f"error: {folder}: exists already; choose another folder with -o" in err) == (2, True)
