"""The page of liftkit try: what its buttons do, and how it is served."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.request import urlopen

import pytest
import torch
from PIL import Image

from liftkit.cli.answers import ALWAYS, KEYS
from liftkit.errors import LiftkitError, UsageError
from liftkit.playground import serve
from liftkit.playground.run import Painted, paint
from liftkit.playground.shelf import Shelf
from liftkit.report.saving import read_settings
from tests.playground import ASKED, BASE, PROMPT, _collected, models, picture, quiet

__all__ = ["_collected", "models", "picture"]
# Gradio leaves event loops to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")


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
    assert all(found[0][shown] is None for shown in view.pictures.values())
    texts = [changes[view.status] for changes in found if view.status in changes]
    assert any("tiny-klein: step 1 of 2, noise level 1.00" in text for text in texts)
    assert "Done in" in texts[-1]
    for label, shown in view.pictures.items():
        files = [changes[shown] for changes in found if changes.get(shown)]
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
    assert (code, len([line for line in err.splitlines() if not line.endswith(" ...")])) == (2, 1)
    assert "model_index.json is missing" in err
    code, _, err = cli("try", tmp_path / "none")
    assert (code, len([line for line in err.splitlines() if not line.endswith(" ...")])) == (2, 1)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, _, err = cli("try", "demo", "--port", port)
        assert (code, len([line for line in err.splitlines() if not line.endswith(" ...")])) == (2, 1)
        assert f"--port {port}: cannot be used" in err
    monkeypatch.setattr(serve, "find_spec", lambda name: None)
    code, _, err = cli("try", "demo")
    assert (code, len([line for line in err.splitlines() if not line.endswith(" ...")])) == (2, 1)
    assert "pip install 'liftkit[try]'" in err


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
