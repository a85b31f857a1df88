"""``liftkit try`` without a browser: models, pictures, steps, memory, the page's functions, and bad input."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from liftkit.embedded import TINY_PIXEL
from liftkit.errors import LiftkitError, UsageError
from liftkit.evaluate.entries import open_entry
from liftkit.evaluate.tied import pixel_noise
from liftkit.models.sampling import sample
from liftkit.options import Guidance, Pictures, Sampler
from liftkit.playground import shelf
from liftkit.playground.abilities import Abilities, abilities
from liftkit.playground.run import MOST_SHOWN, Cancelled, Step, paint
from liftkit.playground.shelf import Shelf
from liftkit.playground.streamed import streamed
from liftkit.report.pictures import to_uint8
from liftkit.report.saving import read_settings
from tests.playground import ASKED, BASE, PROMPT, _collected, models, picture, quiet
from tests.zoo import ZOO

__all__ = ["_collected", "models", "picture"]
# Gradio leaves event loops to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")


def read(path: Path) -> Any:
    return np.asarray(Image.open(path))


def test_each_model_paints_from_the_same_noise(models: Shelf, tmp_path: Path) -> None:
    base, pixel = paint(models, PROMPT, ASKED, models.labels, tmp_path, quiet)
    assert [base.model, pixel.model] == models.labels
    lift = models.entries[pixel.model].lift
    assert lift is not None
    noise = pixel_noise([0], 64, 64, 3)
    for painted, start in ((base, lift.lower(noise)), (pixel, noise)):
        loaded = models.take(painted.model, models.labels)
        again = sample(loaded, [PROMPT], ASKED, noise=start)
        assert np.array_equal(read(painted.file), to_uint8(again)[0])


def test_a_pixel_model_paints_what_liftkit_sample_paints(models: Shelf, tmp_path: Path) -> None:
    label = models.labels[1]
    (painted,) = paint(models, PROMPT, ASKED, [label], tmp_path, quiet)
    again = sample(models.take(label, [label]), [PROMPT], ASKED)
    assert np.array_equal(read(painted.file), to_uint8(again)[0])


def test_a_picture_holds_its_settings(models: Shelf, pixel_klein: Path, tmp_path: Path) -> None:
    asked = replace(ASKED, negative="blue", sampler=Sampler(clamp=True))
    base, pixel = paint(models, PROMPT, asked, models.labels, tmp_path, quiet)
    shared = {
        "prompt": "a red seven",
        "seed": 3,
        "width": 64,
        "height": 64,
        "steps": 3,
        "guidance": 3.0,
        "negative": "blue",
    }
    found = read_settings(pixel.file)
    assert found == pixel.settings
    assert found.items() >= {**shared, "model": pixel_klein.name, "clamp": True}.items()
    assert read_settings(base.file).items() >= {**shared, "model": BASE}.items()
    assert "clamp" not in base.settings
    assert pixel.model in base.settings["noise"]
    assert (base.left_out, pixel.left_out) == (("clamp",), ())
    assert base.file.name == "000003-a-red-seven-tiny-klein.png"


def test_steps_are_shown_and_the_last_is_the_picture(models: Shelf, tmp_path: Path) -> None:
    seen: list[tuple[str, Step | None]] = []
    asked = replace(ASKED, steps=MOST_SHOWN + 3, guidance=Guidance(1.0))
    (painted,) = paint(models, PROMPT, asked, models.labels[1:], tmp_path, lambda *event: seen.append(event))
    assert seen[0][1] is None
    assert [(step.at.index, step.at.count) for _, step in seen[1:] if step] == [
        (n, asked.steps) for n in range(asked.steps)
    ]
    assert len(painted.steps) == MOST_SHOWN
    assert [painted.steps[0].at.index, painted.steps[-1].at.index] == [0, asked.steps - 1]
    levels = [step.at.sigma for step in painted.steps]
    assert levels == sorted(levels, reverse=True)
    assert levels[0] == pytest.approx(1.0)
    files = [step.estimate for step in painted.steps]
    assert np.abs(read(files[-1]).astype(int) - read(painted.file)).max() <= 1
    assert np.abs(read(files[0]).astype(int) - read(painted.file)).max() > 20
    assert files[0].name == painted.file.name.replace(".png", "-step-0001.png")
    assert read_settings(files[0]) == {**read_settings(painted.file), "estimate_after_step": 1}


def test_a_stopped_run_leaves_the_model_as_it_was(models: Shelf, tmp_path: Path) -> None:
    label = models.labels[1]
    scheduler = models.take(label, [label]).pipeline.scheduler

    def stop(model: str, step: Step | None) -> None:
        if step is not None and step.at.index == 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        list(paint(models, PROMPT, replace(ASKED, sampler=Sampler(clamp=True)), [label], tmp_path, stop))
    after = models.take(label, [label]).pipeline.scheduler
    assert after is scheduler
    assert "step" not in vars(after)


def test_sizes_are_made_of_whole_tokens_and_may_be_oblong(models: Shelf, tmp_path: Path) -> None:
    for painted in paint(models, PROMPT, replace(ASKED, width=96, height=40), models.labels, tmp_path, quiet):
        assert Image.open(painted.file).size == (96, 40)
        assert Image.open(painted.steps[0].estimate).size == (96, 40)
    with pytest.raises(UsageError, match="width 60: not a multiple of the 8 pixels"):
        list(paint(models, PROMPT, replace(ASKED, width=60), models.labels, tmp_path, quiet))
    with pytest.raises(UsageError, match="no model is chosen"):
        list(paint(models, PROMPT, ASKED, [], tmp_path, quiet))


@pytest.mark.parametrize("solver", ["heun", "unipc"])
def test_other_solvers_show_their_steps_too(models: Shelf, tmp_path: Path, solver: Any) -> None:
    asked = replace(ASKED, sampler=Sampler(solver=solver))
    for painted in paint(models, PROMPT, asked, models.labels, tmp_path, quiet):
        assert painted.settings["solver"] == solver
        assert len(painted.steps) == painted.steps[0].at.count == (5 if solver == "heun" else 3)
        assert np.abs(read(painted.steps[-1].estimate).astype(int) - read(painted.file)).max() <= 1
        assert type(models.take(painted.model, models.labels).pipeline.scheduler).__name__.endswith(
            "EulerDiscreteScheduler"
        )


def test_models_load_when_used_and_leave_when_others_are_chosen(models: Shelf, pixel_klein: Path) -> None:
    entries = [open_entry("demo"), open_entry(str(pixel_klein)), open_entry(str(TINY_PIXEL))]
    found = Shelf(entries, "cpu")
    first, second, third = found.labels
    assert found.loaded == []
    model = found.take(first, [first, second])
    found.take(second, [first, second])
    assert found.loaded == [first, second]
    assert found.take(first, [first, second]) is model
    found.take(third, [third])
    assert found.loaded == [third]


def test_where_not_all_fit_one_at_a_time_is_in_memory(models: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Shelf(list(models.entries.values()), "cpu")
    first, second = found.labels
    assert found.needs(first) == pytest.approx(1.1 * 4 * 4.82e6, rel=0.01)
    monkeypatch.setattr(shelf, "available_memory", lambda device: 30e6 if len(found.loaded) == 0 else 10e6)
    found.take(first, [first, second])
    found.take(second, [first, second])
    assert found.loaded == [second]
    monkeypatch.setattr(shelf, "available_memory", lambda device: 12e6)
    with pytest.raises(LiftkitError, match=r"tiny-klein: its weights need 0.0212 GB on cpu, and 0.012 GB are free"):
        found.take(first, [first])


def test_latents_are_tied_by_a_pixel_model_that_fits(models: Shelf, pixel_klein: Path) -> None:
    base, pixel = models.labels
    assert models.tie(base, models.labels) == (pixel, models.entries[pixel].lift)
    alone = Shelf([open_entry("demo")], "cpu")
    assert alone.tie(BASE, [BASE]) is None
    strange = Shelf(
        [open_entry("demo"), replace(open_entry(str(pixel_klein)), lift=ZOO["SD3Transformer2DModel"].lift())], "cpu"
    )
    assert strange.tie(BASE, strange.labels) is None


def test_a_latent_model_alone_draws_its_own_noise(tmp_path: Path) -> None:
    alone = Shelf([open_entry("demo")], "cpu")
    (painted,) = paint(alone, PROMPT, ASKED, alone.labels, tmp_path, quiet)
    again = sample(alone.take(BASE, [BASE]), [PROMPT], ASKED)
    assert np.array_equal(read(painted.file), to_uint8(again)[0])
    assert "noise" not in painted.settings


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("SD3Transformer2DModel", {"negative": True, "guidance": True, "steps": 28, "scale": 7.0}),
        ("QwenImageTransformer2DModel", {"negative": True, "guidance": True, "steps": 50, "scale": 4.0}),
        ("SanaTransformer2DModel", {"negative": True, "guidance": True, "steps": 20, "scale": 4.5}),
        ("ZImageTransformer2DModel", {"negative": True, "guidance": True, "steps": 50, "scale": 5.0}),
    ],
)
def test_what_a_model_can_do_is_read_off_its_folder(name: str, expected: dict[str, Any], tmp_path: Path) -> None:
    specimen = ZOO[name]
    specimen.build().save_pretrained(tmp_path)
    can = abilities(open_entry(str(tmp_path)))
    assert {key: getattr(can, key) for key in expected} == expected
    assert can.side == specimen.factor * specimen.patch
    assert (can.clamp, can.clamped) == (False, False)


def test_a_distilled_model_neither_guides_nor_takes_negative_prompts(models: Shelf) -> None:
    entry = models.entries[BASE]
    index = {**entry.folder.index, "is_distilled": True}
    can = abilities(replace(entry, folder=replace(entry.folder, index=index)))
    assert (can.negative, can.guidance, can.scale) == (False, False, 1.0)


def test_several_models_can_do_what_any_can() -> None:
    plain = Abilities(
        negative=False, guidance=False, clamp=False, clamped=False, references=0, side=8, size=64, steps=4, scale=1.0
    )
    other = replace(plain, negative=True, clamp=True, references=10, side=12, size=1024, steps=50)
    assert plain.with_(other) == replace(plain, negative=True, clamp=True, references=10, side=24)


def test_work_is_streamed_in_order_and_its_errors_come_out() -> None:
    def work(report: Any) -> Iterator[str]:
        report("a", 1)
        yield "b"
        raise UsageError("no")

    found = streamed(work, threading.Event())
    assert [next(found), next(found)] == [("a", 1), "b"]
    with pytest.raises(UsageError, match="no"):
        next(found)


def test_work_ends_where_it_is_stopped_or_nobody_listens() -> None:
    ended: list[str] = []

    def work(report: Any) -> Iterator[str]:
        try:
            while True:
                report("step")
        finally:
            ended.append("ended")
        yield "never"

    stop = threading.Event()
    found = streamed(work, stop)
    next(found)
    stop.set()
    with pytest.raises(Cancelled):
        list(found)
    found = streamed(work, threading.Event())
    next(found)
    found.close()
    assert ended == ["ended", "ended"]


def test_all_models_start_from_a_picture(models: Shelf, picture: Path, tmp_path: Path) -> None:
    asked = replace(ASKED, steps=6, height=64, width=64, pictures=Pictures(image=picture, strength=0.5))
    for painted in paint(models, PROMPT, asked, models.labels, tmp_path, quiet):
        assert (painted.settings["image"], painted.settings["strength"]) == ("start.png", 0.5)
        assert [step.at.index for step in painted.steps] == [0, 1, 2]
        assert painted.steps[0].at.sigma < 0.9
        red, _, blue = read(painted.file).mean(axis=(0, 1))
        assert red > blue + 30, "orange is still to be seen"
        assert np.abs(read(painted.steps[-1].estimate).astype(int) - read(painted.file)).max() <= 1


def test_reference_images_go_to_models_that_take_them(models: Shelf, picture: Path, tmp_path: Path) -> None:
    asked = replace(ASKED, height=64, width=64, pictures=Pictures(references=(picture,)))
    label = models.labels[1]
    assert models.abilities[label].references == 10
    (painted,) = paint(models, PROMPT, asked, [label], tmp_path / "a", quiet)
    (without,) = paint(models, PROMPT, replace(asked, pictures=Pictures()), [label], tmp_path / "b", quiet)
    assert painted.settings["references"] == ["start.png"]
    assert not np.array_equal(read(painted.file), read(without.file))
    unable = Shelf(list(models.entries.values()), "cpu")
    unable.abilities[label] = replace(models.abilities[label], references=0)
    (left,) = paint(unable, PROMPT, asked, [label], tmp_path / "c", quiet)
    assert np.array_equal(read(left.file), read(without.file))
    assert left.left_out == ("reference images",)
