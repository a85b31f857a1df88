"""``liftkit try`` without a browser: models, pictures, steps, memory, the page's functions, and bad input."""

from __future__ import annotations

import gc
import json
import socket
import threading
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.request import urlopen

import numpy as np
import pytest
import torch
from PIL import Image

from liftkit.cli.answers import ALWAYS, KEYS
from liftkit.embedded import TINY_PIXEL
from liftkit.errors import LiftkitError, UsageError
from liftkit.evaluate.entries import open_entry
from liftkit.evaluate.tied import pixel_noise
from liftkit.models.sampling import sample
from liftkit.options import Guidance, Pictures, SampleOptions, Sampler
from liftkit.playground import serve, shelf
from liftkit.playground.abilities import Abilities, abilities
from liftkit.playground.run import MOST_SHOWN, Cancelled, Painted, Step, paint
from liftkit.playground.shelf import Shelf
from liftkit.playground.streamed import streamed
from liftkit.report.pictures import to_uint8
from liftkit.report.saving import read_settings
from tests.zoo import ZOO

# Gradio leaves event loops to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
BASE = "tiny-klein"
PROMPT = "a red seven"
ASKED = SampleOptions(seed=3, steps=3, guidance=Guidance(3.0))


@pytest.fixture(scope="module", autouse=True)
def _collected() -> Iterator[None]:
    """What Gradio leaves is collected here, so that no other test is blamed for it."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture(scope="module")
def models(pixel_klein: Path) -> Shelf:
    return Shelf([open_entry("demo"), open_entry(str(pixel_klein))], "cpu")


def quiet(*_: Any) -> None:
    """Observes nothing."""


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


@pytest.fixture
def page(models: Shelf, tmp_path: Path) -> Any:
    pytest.importorskip("gradio", reason="gradio is not installed: pip install 'liftkit[try]'")
    from liftkit.playground.page import Page

    return Page(models, tmp_path)


def values(page: Any, **changes: Any) -> dict[Any, Any]:
    """The page's choices by component, as Gradio hands them over."""
    choices = page.choices
    chosen = {
        "prompt": "a red seven",
        "negative": "",
        "seed": 3,
        "width": 64,
        "height": 64,
        "steps": 2,
        "guidance": 1.0,
        "solver": "",
        "image": None,
        "strength": 0.6,
        "references": None,
    }
    chosen |= {"clamp": False, "models": page.shelf.labels, **changes}
    return {choices.models: chosen.pop("models"), **{choices.fields[name]: value for name, value in chosen.items()}}


SESSION: Any = SimpleNamespace(session_hash="a")


def test_a_click_makes_pictures_step_by_step(page: Any) -> None:
    view = page.view
    found = list(page.paint(values(page), SESSION))
    assert "Starting" in found[0][view.status]
    assert all(found[0][picture] is None for picture in view.pictures.values())
    texts = [changes[view.status] for changes in found if view.status in changes]
    assert any("tiny-klein: step 1 of 2, noise level 1.00" in text for text in texts)
    assert "Done in" in texts[-1]
    for label, picture in view.pictures.items():
        files = [changes[picture] for changes in found if changes.get(picture)]
        assert len(files) == 3  # two steps and the finished picture
        assert read_settings(files[-1])["prompt"] == "a red seven"
        assert any("64 x 64 pixels" in changes.get(view.notes[label], "") for changes in found)
    results = found[-1][view.results]
    assert [each.model for each in results] == page.shelf.labels
    assert found[-1][view.looking]["visible"]
    assert found[-1][view.at]["value"] == 3
    assert found[-1][view.wipe] == tuple(str(each.file) for each in results)
    assert set().union(*found) <= set(view.changing)


def test_the_page_shows_any_step_and_wipes_between_any_two(page: Any) -> None:
    results: list[Painted] = list(page.paint(values(page), SESSION))[-1][page.view.results]
    base, pixel = page.shelf.labels
    first = page.show(results, 1, pixel, base)
    assert first[page.view.pictures[base]] == str(results[0].steps[0].estimate)
    assert first[page.view.wipe] == (str(results[1].steps[0].estimate), str(results[0].steps[0].estimate))
    assert "after step 1" in first[page.view.at]["info"]
    last = page.show(results, 3, pixel, None)
    assert last[page.view.pictures[base]] == str(results[0].file)
    assert page.view.wipe not in last


def test_the_page_shows_what_the_chosen_models_can_do(page: Any) -> None:
    base, pixel = page.shelf.labels
    clamp, negative = page.choices.optional["clamp"], page.choices.optional["negative"]
    changes = page.adapt([base])
    assert (changes[clamp]["visible"], changes[negative]["visible"]) == (False, True)
    assert [changes[card]["visible"] for card in page.view.cards.values()] == [True, False]
    assert page.adapt([pixel])[clamp]["visible"]
    # A choice that is hidden keeps its value in the browser, and is not taken.
    (*_, last) = page.paint(values(page, models=[base], clamp=True), SESSION)
    assert last[page.view.results][0].left_out == ()
    assert page.view.wiping not in last


def test_errors_are_one_line_on_the_page(page: Any) -> None:
    for changes, message in (
        ({"models": []}, "no model is chosen; choose at least one"),
        ({"width": 60}, "width 60: not a multiple of the 8 pixels of one token"),
        ({"seed": None}, "seed: expected a whole number"),
        ({"seed": -1}, "seed: expected a whole number"),
        ({"steps": 2.5}, "steps: expected a whole number from 1 to 10000, got 2.5"),
        ({"height": float("nan")}, "height: expected a whole number"),
        ({"width": 10**6}, "width: expected a whole number"),
        ({"prompt": "<b>\ud800"}, "&lt;b&gt;"),
    ):
        (*_, last) = page.paint(values(page, **changes), SESSION)
        assert message in last[page.view.status]
        assert 'role="alert"' in last[page.view.status]
        assert "<b>" not in last[page.view.status]
        assert last[page.view.results] == []


def test_stop_ends_the_run_of_its_own_page(page: Any) -> None:
    run = page.paint(values(page, steps=50), SESSION)
    seen = [next(run) for _ in range(4)]
    page.stop(SimpleNamespace(session_hash="another"))
    seen.append(next(run))
    page.stop(SESSION)
    rest = list(run)
    assert "Stopped." in rest[-1][page.view.status]
    assert len(seen) + len(rest) < 50


def test_files_of_old_runs_go(page: Any, tmp_path: Path) -> None:
    for _ in range(6):
        list(page.paint(values(page, models=page.shelf.labels[1:], steps=1), SESSION))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "4", "5", "6"]


def test_it_is_served_on_this_machine_alone_without_a_word_to_others(models: Shelf, tmp_path: Path) -> None:
    pytest.importorskip("gradio", reason="gradio is not installed: pip install 'liftkit[try]'")
    port = serve.free_port(None)
    served, address, public = serve.launch(models, port, False, tmp_path)
    try:
        assert (address, public) == (f"http://127.0.0.1:{port}/", None)
        assert served.analytics_enabled is False
        text = urlopen(f"{address}config", timeout=10).read().decode()
        assert BASE in text
        assert "fonts.googleapis" not in text
        with pytest.raises(UsageError, match=f"--port {port}: cannot be used"):
            serve.free_port(port)
    finally:
        served.close(verbose=False)


def test_the_address_is_printed_and_answered(cli: Any, monkeypatch: pytest.MonkeyPatch, pixel_klein: Path) -> None:
    served: list[tuple[list[str], int, bool]] = []

    def serve_(shelf: Shelf, port: int, share: bool, ready: Any) -> None:
        served.append((shelf.labels, port, share))
        ready(f"http://127.0.0.1:{port}/", None)

    monkeypatch.setattr(serve, "serve", serve_)
    monkeypatch.setattr(serve, "find_spec", lambda name: name)
    code, out, _ = cli("try", "demo", pixel_klein, "--device", "cpu", "--port", 54321)
    assert code == 0
    assert out == "tiny-klein, pixel (cpu: as asked) at http://127.0.0.1:54321/; Ctrl-C ends it\n"
    code, out, _ = cli("--json", "try", "demo", "--device", "cpu", "--port", 54321)
    answer = json.loads(out)
    assert set(answer) - set(ALWAYS) == set(KEYS["try"])
    assert (answer["address"], answer["models"]) == ("http://127.0.0.1:54321/", ["tiny-klein"])
    assert served == [(["tiny-klein", "pixel"], 54321, False), (["tiny-klein"], 54321, False)]


def test_bad_input_is_one_line(cli: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code, _, err = cli("try", tmp_path)
    assert (code, err.count("\n")) == (2, 1)
    assert "model_index.json is missing" in err
    code, _, err = cli("try", tmp_path / "none")
    assert (code, err.count("\n")) == (2, 1)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, _, err = cli("try", "demo", "--port", port)
        assert (code, err.count("\n")) == (2, 1)
        assert f"--port {port}: cannot be used" in err
    monkeypatch.setattr(serve, "find_spec", lambda name: None)
    code, _, err = cli("try", "demo")
    assert (code, err.count("\n")) == (2, 1)
    assert "pip install 'liftkit[try]'" in err


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "given" / "start.png"
    path.parent.mkdir()
    Image.new("RGB", (96, 80), "orange").save(path)
    return path


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


def test_the_page_shows_given_pictures_and_says_which_are_none(page: Any, picture: Path, tmp_path: Path) -> None:
    broken = tmp_path / "given" / "broken.png"
    broken.write_text("no picture")
    changes = page.look(str(picture), [str(broken)])
    ((small, name),) = changes[page.choices.seen]["value"]
    assert (Image.open(small).size, name) == ((96, 80), "start.png")
    assert "broken.png" in changes[page.view.status]
    assert str(tmp_path) not in changes[page.view.status]
    (*_, last) = page.paint(values(page, image=str(broken)), SESSION)
    assert "broken.png" in last[page.view.status]
    assert 'role="alert"' in last[page.view.status]
    (*_, last) = page.paint(values(page, image=str(picture)), SESSION)
    assert last[page.view.results][0].settings["strength"] == 0.6


def test_lack_of_memory_while_painting_is_one_line(
    models: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("liftkit.playground.run.sample", full)
    with pytest.raises(LiftkitError, match="tiny-klein: no memory left on cpu; take a smaller picture"):
        list(paint(models, PROMPT, ASKED, models.labels, tmp_path, quiet))
