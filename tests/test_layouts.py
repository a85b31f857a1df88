"""Folders that benchmarks read: each is read here by the rules of the benchmark's own reader."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from liftkit.checkpoint.model import find_model
from liftkit.embedded import TINY_KLEIN
from liftkit.evaluate import generate as module
from tests.processes import launch

Cli = Callable[..., tuple[int, str, str]]
Run = Callable[..., tuple[int, str, str]]
SIDE = 32


@pytest.fixture(scope="module", autouse=True)
def _loaded_once() -> Iterator[None]:
    loaded = module.load_pipeline(find_model(str(TINY_KLEIN)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_pipeline", lambda *given, **named: loaded)
        yield


@pytest.fixture
def run(cli: Cli, tmp_path: Path) -> Run:
    def generate(layout: str, *more: object) -> tuple[int, str, str]:
        common = ["--steps", 1, "--height", SIDE, "--width", SIDE, "--device", "cpu"]
        return cli("generate", "demo", "--layout", layout, "-o", tmp_path / "out", *common, *more)

    return generate


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def quarters(path: Path) -> list[np.ndarray]:
    """What the readers of grids cut out, in their order: left to right, then down."""
    image = Image.open(path)
    assert image.size == (2 * SIDE, 2 * SIDE)
    return [np.asarray(image.crop((x, y, x + SIDE, y + SIDE))) for y in (0, SIDE) for x in (0, SIDE)]


def geneval_file(folder: Path) -> Path:
    entries = [
        {"tag": "single_object", "include": [{"class": "cat", "count": 1}], "prompt": "a photo of a cat"},
        {
            "tag": "counting",
            "include": [{"class": "dog", "count": 2}],
            "exclude": [],
            "prompt": "two dogs, très petits",
        },
    ]
    path = folder / "evaluation_metadata.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in entries), "utf-8")
    return path


def test_geneval_finds_samples_and_metadata(run: Run, tmp_path: Path) -> None:
    prompts = geneval_file(tmp_path)
    code, out, err = run("geneval", "--prompts", prompts, "--seed", 5)
    assert code == 0, err
    assert "8 new images" in out
    expected = [json.loads(line) for line in prompts.read_text("utf-8").splitlines()]
    found: dict[str, Any] = {}
    # It takes folders whose name is all digits, one JSON object in each, and pictures whose name begins with digits.
    for name in os.listdir(tmp_path / "out"):
        folder = tmp_path / "out" / name
        if folder.is_dir() and name.isdigit():
            with (folder / "metadata.jsonl").open(encoding="utf-8") as file:
                found[name] = json.load(file)
            samples = sorted(each for each in os.listdir(folder / "samples") if re.match(r"\d+\.png", each))
            assert samples == ["0000.png", "0001.png", "0002.png", "0003.png"]
            singles = [pixels(folder / "samples" / each) for each in samples]
            assert all(np.array_equal(a, b) for a, b in zip(quarters(folder / "grid.png"), singles))
            assert not np.array_equal(singles[0], singles[1])
    assert found == {"00000": expected[0], "00001": expected[1]}
    lines = [json.loads(line) for line in (tmp_path / "out" / "metadata.jsonl").read_text("utf-8").splitlines()]
    assert lines[6] == {"file_name": "00001/samples/0002.png", "text": expected[1]["prompt"], "seed": 11}


def test_an_interrupted_benchmark_is_gone_on_with(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, sampled, original = geneval_file(tmp_path), [], module.sample

    def interrupted(loaded: Any, texts: list[str], *given: Any, **more: Any) -> Any:
        if sampled:
            raise KeyboardInterrupt
        sampled.append(texts)
        return original(loaded, texts, *given, **more)

    with monkeypatch.context() as patch:
        patch.setattr(module, "sample", interrupted)
        assert run("geneval", "--prompts", prompts, "--batch-size", 3)[0] == 130
    assert len(list((tmp_path / "out").rglob("samples/*.png"))) == 3
    code, out, err = run("geneval", "--prompts", prompts, "--batch-size", 3)
    assert code == 0, err
    assert "5 new images" in out
    assert len(list((tmp_path / "out").rglob("grid.png"))) == 2
    prompts.write_text(prompts.read_text("utf-8").replace("single_object", "other"), "utf-8")
    code, _, err = run("geneval", "--prompts", prompts)
    assert code == 2
    assert "layout_digest" in err


def test_dpg_finds_a_grid_for_each_file_of_prompts(run: Run, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    for name, text in (("partiprompts12.txt", "a red seven\n"), ("7.txt", "a blue two"), ("notes.md", "not a prompt")):
        (prompts / name).write_text(text)
    code, _, err = run("dpg", "--prompts", prompts)
    assert code == 0, err
    assert "notes.md" in err
    # It takes everything in the folder, by the name up to the first point, and cuts out four squares.
    folder = tmp_path / "out" / "images"
    assert sorted(name.split(".")[0] for name in os.listdir(folder)) == ["7", "partiprompts12"]
    singles = [pixels(tmp_path / "out" / "samples" / "7" / f"{each}.png") for each in range(4)]
    assert all(np.array_equal(a, b) for a, b in zip(quarters(folder / "7.png"), singles))
    # Its program leaves its results among the grids; the folder can still be gone on with.
    (folder / "dpg-bench_results.txt").write_text("0.9")
    code, out, err = run("dpg", "--prompts", prompts)
    assert code == 0, err
    assert "0 new images" in out
    code, _, err = run("dpg", "--prompts", prompts, "--width", 64)
    assert code == 2
    assert "squares" in err


def test_hpsv3_finds_the_prompt_beside_each_picture(run: Run, tmp_path: Path) -> None:
    prompts = tmp_path / "benchmark"
    prompts.mkdir()
    for category, image in (("Animals", "a/12.jpg"), ("Natural Scenery", "b/12.png")):
        entry = {"category": category, "image_file": image, "caption": f"one of {category}"}
        (prompts / f"benchmark_{category}.json").write_text(json.dumps([entry]))
    code, _, err = run("hpsv3", "--prompts", prompts)
    assert code == 0, err
    # It is given one folder for each category, and takes the text that has the picture's name, however deep.
    found = {}
    for picture in (tmp_path / "out").glob("**/*.png"):
        found[picture.parent.name] = Path(f"{str(picture)[:-4]}.txt").read_text()
        assert pixels(picture).shape == (SIDE, SIDE, 3)
    assert found == {"Animals": "one of Animals", "Natural Scenery": "one of Natural Scenery"}


def test_coco_keeps_image_ids_and_the_caption_that_was_painted(run: Run, tmp_path: Path) -> None:
    prompts = tmp_path / "captions_val2014.json"
    images = [{"id": each, "file_name": f"COCO_val2014_{each:012d}.jpg"} for each in (42, 9)]
    rows = [(3, 42, "second"), (1, 42, "a seven"), (2, 9, "a two\n")]
    annotations = [{"id": a, "image_id": b, "caption": c} for a, b, c in rows]
    prompts.write_text(json.dumps({"info": {}, "images": images, "annotations": annotations}))
    code, _, err = run("coco", "--prompts", prompts)
    assert code == 0, err
    assert "a further caption" in err
    written = json.loads((tmp_path / "out" / "captions.json").read_text())
    names = {each["id"]: each["file_name"] for each in written["images"]}
    assert [(each["image_id"], each["caption"]) for each in written["annotations"]] == [(9, "a two"), (42, "a seven")]
    # Tools of FID take every picture that they find in the folder, and no name says more.
    assert sorted(os.listdir(tmp_path / "out" / "images")) == sorted(names.values())
    assert names[42] == "COCO_val2014_000000000042.png"


@pytest.mark.slow
def test_processes_share_a_benchmark(run: Run, tmp_path: Path) -> None:
    """Two of them make the same files as one; the first speaks."""
    prompts = geneval_file(tmp_path)
    assert run("geneval", "--prompts", prompts, "--batch-size", 2)[0] == 0
    arguments = ["demo", "--layout", "geneval", "--prompts", prompts, "-o", tmp_path / "both", "--batch-size", 2]
    arguments += ["--steps", 1, "--height", SIDE, "--width", SIDE, "--device", "cpu"]
    said = launch(2, "liftkit", "generate", *arguments)
    assert said.count("8 new images") == 1
    files = [
        sorted(path.relative_to(top) for path in top.rglob("*.*")) for top in (tmp_path / "out", tmp_path / "both")
    ]
    assert files[0] == files[1]
    for name in (name for name in files[0] if name.suffix == ".png"):
        assert np.array_equal(pixels(tmp_path / "out" / name), pixels(tmp_path / "both" / name)), name
    both = (tmp_path / "both" / "metadata.jsonl").read_text("utf-8")
    assert both == (tmp_path / "out" / "metadata.jsonl").read_text("utf-8")


@pytest.mark.parametrize(
    ("layout", "content", "more", "message"),
    [
        ("geneval", '{"prompt": "a cat"}\n', [], "no 'tag'"),
        ("geneval", "a cat\n", [], "no valid JSON"),
        ("geneval", '{"tag": "a", "include": [], "prompt": "a"}\n', ["-n", 3], "multiple of 4 up to 4"),
        ("geneval", '{"tag": "a", "include": [], "prompt": "a"}\n', ["--image", "x.png"], "from text alone"),
        ("dpg", "a cat\n", [], "the folder of .txt files"),
        ("hpsv3", '[{"category": "../up", "image_file": "1.jpg", "caption": "a"}]', [], "cannot be the name"),
        ("hpsv3", '[{"category": "A", "image_file": 7, "caption": "a"}]', [], "cannot be the name"),
        ("hpsv3", '[{"category": "generate.json", "image_file": "1.jpg", "caption": "a"}]', [], "cannot be the name"),
        (
            "hpsv3",
            '[{"category": "%s", "image_file": "1.jpg", "caption": "a"}]' % ("語" * 90),
            [],
            "cannot be the name",
        ),
        ("hpsv3", '[{"category": "A", "image_file": "1.jpg", "caption": "a \\ud83d"}]', [], "half of a surrogate pair"),
        ("hpsv3", "[]", [], "holds no prompt"),
        (
            "hpsv3",
            '[{"category": "A", "image_file": "1.jpg", "caption": "a"}, {"category": "a", "image_file": "1", "text": "b"}]',
            [],
            "two prompts are called",
        ),
        ("coco", '{"images": []}', [], "no list of annotations"),
        ("coco", '{"images": [{"id": true}], "annotations": []}', [], "no whole number"),
    ],
)
def test_bad_prompts_leave_nothing(
    run: Run, tmp_path: Path, layout: str, content: str, more: list[object], message: str
) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "x.png")
    (tmp_path / "prompts").write_text(content, "utf-8")
    more = [tmp_path / each if each == "x.png" else each for each in more]
    code, _, err = run(layout, "--prompts", tmp_path / "prompts", *more)
    assert code == 2, err
    assert message in err
    assert not (tmp_path / "out").exists()


def test_without_a_layout_the_number_of_images_is_needed(cli: Cli, tmp_path: Path) -> None:
    code, _, err = cli("generate", "demo", "--prompts", "demo", "-o", tmp_path / "out")
    assert code == 2
    assert "-n" in err
    assert not (tmp_path / "out").exists()
