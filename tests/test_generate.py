"""Self-generated data: a folder that is the same whatever the batch or the interruption, and that training reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from liftkit.checkpoint.model import find_model
from liftkit.data.captioned import CaptionedFolder
from liftkit.embedded import TINY_KLEIN
from liftkit.errors import UsageError
from liftkit.evaluate import generate as module
from liftkit.evaluate.generate import generate
from liftkit.options import GenerateOptions, Guidance, Pictures, SampleOptions

Cli = Callable[..., tuple[int, str, str]]
PROMPTS = ["a red seven on flower petals", "a blue two on a temple roof", "ein weißer Bär"]


@pytest.fixture(scope="module", autouse=True)
def _loaded_once() -> Any:
    """One pipeline for all tests of this file."""
    loaded = module.load_pipeline(find_model(str(TINY_KLEIN)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_pipeline", lambda *given, **named: loaded)
        yield


def options(count: int, **changes: Any) -> GenerateOptions:
    return GenerateOptions(count=count, **{"steps": 2, "height": 32, "width": 32, **changes})


def make(output: Path, count: int, **changes: Any) -> Any:
    return generate(find_model(str(TINY_KLEIN)), PROMPTS, output, options(count, **changes))


def pixels(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)).astype(int) for path in sorted(folder.glob("*.png"))}


def assert_same_images(a: Path, b: Path) -> None:
    first, second = pixels(a), pixels(b)
    assert first.keys() == second.keys()
    assert all(abs(first[name] - second[name]).max() <= 1 for name in first)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five images made at once; not to be changed."""
    folder = tmp_path_factory.mktemp("generated") / "whole"
    make(folder, 5, batch_size=5)
    return folder


def test_the_folder_is_a_captioned_source(whole: Path) -> None:
    source = CaptionedFolder(whole)
    assert [source.label(index) for index in range(5)] == [f"{index:06d}.png" for index in range(5)]
    assert [source.caption(index) for index in range(5)] == [*PROMPTS, *PROMPTS[:2]]
    assert source.size(0) == (32, 32)
    lines = [json.loads(line) for line in (whole / "metadata.jsonl").read_text().splitlines()]
    assert lines[3] == {"file_name": "000003.png", "text": PROMPTS[0], "seed": 3}
    assert not np.array_equal(*list(pixels(whole).values())[::3])
    record = json.loads((whole / "generate.json").read_text())
    assert record["settings"]["steps"] == 2
    assert record["settings"]["model"] == "tiny-klein"
    assert sorted(path.suffix for path in whole.iterdir()) == [".json", ".jsonl", *[".png"] * 5]


def test_images_are_those_of_sample_from_the_same_seed(whole: Path) -> None:
    loaded = module.load_pipeline(find_model(str(TINY_KLEIN)), "cpu")
    images = module.sample(loaded, PROMPTS[1:2], SampleOptions(seed=1, height=32, width=32, steps=2))
    expected = module.to_uint8(images[0]).permute(1, 2, 0).numpy().astype(int)
    assert abs(pixels(whole)["000001.png"] - expected).max() <= 1


def test_an_interrupted_folder_is_gone_on_with(
    whole: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompts.txt").write_text("\n\n".join(PROMPTS), "utf-8")
    sampled: list[int] = []
    original = module.sample

    def interrupted(loaded: Any, prompts: list[str], *given: Any, **more: Any) -> Any:
        if len(sampled) == 1:
            raise KeyboardInterrupt
        sampled.append(len(prompts))
        return original(loaded, prompts, *given, **more)

    command = ["generate", "demo", "--prompts", tmp_path / "prompts.txt", "-n", 5, "-o", tmp_path / "out", "--steps", 2]
    command += ["--height", 32, "--width", 32, "--device", "cpu", "--batch-size", 2]
    with monkeypatch.context() as patch:
        patch.setattr(module, "sample", interrupted)
        code, _, err = cli(*command)
    assert (code, sampled) == (130, [2])
    assert "interrupted" in err
    assert len(CaptionedFolder(tmp_path / "out")) == 2
    assert CaptionedFolder(tmp_path / "out").caption(1) == PROMPTS[1]
    # As after a kill: an image without its caption, and half a line.
    (tmp_path / "out" / "metadata.jsonl").write_text('{"file_name": "0000')
    code, out, err = cli(*command)
    assert code == 0, err
    assert "3 new images" in out
    assert "2 images had been made" in err
    assert_same_images(tmp_path / "out", whole)
    assert (tmp_path / "out" / "metadata.jsonl").read_bytes() == (whole / "metadata.jsonl").read_bytes()
    monkeypatch.setattr(module, "sample", None)
    assert cli(*command)[0] == 0


def test_a_finished_folder_can_be_made_larger_and_gaps_are_filled(whole: Path, tmp_path: Path) -> None:
    make(tmp_path / "out", 3, batch_size=2)
    (tmp_path / "out" / "000001.png").unlink()
    done = make(tmp_path / "out", 5)
    assert (done.new, done.found) == (3, 2)
    assert_same_images(tmp_path / "out", whole)


def test_a_gap_is_sampled_in_the_batch_that_it_was_in(tmp_path: Path) -> None:
    make(tmp_path / "out", 4, batch_size=2)
    gaps = {name: (tmp_path / "out" / name).read_bytes() for name in ("000001.png", "000002.png")}
    for name in gaps:
        (tmp_path / "out" / name).unlink()
    assert make(tmp_path / "out", 4, batch_size=2).new == 2
    assert {name: (tmp_path / "out" / name).read_bytes() for name in gaps} == gaps


@pytest.mark.parametrize("changes", [{"seed": 1}, {"steps": 3}, {"guidance": Guidance(2.0)}, {"height": 64}])
def test_other_settings_in_the_same_folder_are_refused(whole: Path, changes: dict[str, Any]) -> None:
    before = {path.name: path.read_bytes() for path in whole.iterdir()}
    with pytest.raises(UsageError, match=rf"other settings \({next(iter(changes))}"):
        make(whole, 6, **changes)
    with pytest.raises(UsageError, match="prompts"):
        generate(find_model(str(TINY_KLEIN)), [*PROMPTS, "more"], whole, options(6))
    assert {path.name: path.read_bytes() for path in whole.iterdir()} == before


def test_another_picture_under_the_same_name_is_refused(tmp_path: Path) -> None:
    start = tmp_path / "start.png"
    Image.new("RGB", (64, 64), (200, 40, 90)).save(start)
    make(tmp_path / "out", 1, pictures=Pictures(image=start))
    assert make(tmp_path / "out", 1, pictures=Pictures(image=start)).found == 1
    Image.new("RGB", (64, 64), (20, 40, 90)).save(start)
    with pytest.raises(UsageError, match="pictures_digest"):
        make(tmp_path / "out", 1, pictures=Pictures(image=start))


def test_another_model_of_the_same_name_is_refused(whole: Path, tmp_path: Path) -> None:
    import shutil

    other = shutil.copytree(TINY_KLEIN, tmp_path / "tiny-klein")
    assert generate(find_model(str(other)), PROMPTS, whole, options(5)).new == 0
    weights = other / "transformer" / "diffusion_pytorch_model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    with pytest.raises(UsageError, match="model_digest"):
        generate(find_model(str(other)), PROMPTS, whole, options(6))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompts", "none.txt", "-o", "new"], "none.txt: no such file"),
        (["--prompts", "demo", "-o", "notes"], "holds files but no generate.json"),
        (["--prompts", "demo", "-o", "notes/a.txt"], "is a file"),
        (["--prompts", "demo", "-o", "no/where"], "no such folder"),
        (["--prompts", "demo", "-o", "new", "--height", "33"], "--height 33"),
        (["--prompts", "demo", "-o", "broken"], "generate.json: no valid JSON"),
    ],
)
def test_bad_input_leaves_nothing(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in (("notes/a.txt", "mine"), ("broken/generate.json", "{")):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(content)
    before = sorted(tmp_path.rglob("*"))
    code, _, err = cli("generate", "demo", "-n", 2, "--device", "cpu", *arguments)
    assert code == 2
    assert message in err
    assert sorted(tmp_path.rglob("*")) == before
