"""``liftkit try`` in a real browser: headless Chromium by playwright, where both are there."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from liftkit.report.saving import read_settings

pytest.importorskip("gradio", reason="gradio is not installed: pip install 'liftkit[try]'")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium here"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
DONE = 60_000
"""Milliseconds that a run may take on a busy machine."""


@pytest.fixture(scope="module")
def address(pixel_klein: Path) -> Iterator[str]:
    """A page of two models, served by the command; Ctrl-C ends it well."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    arguments = ["try", "demo", str(pixel_klein), "--device", "cpu"]
    command = [sys.executable, "-c", "from liftkit.cli.app import run; run()", *arguments]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as served:
        assert served.stdout is not None
        try:
            found = re.search(r"http://127\.0\.0\.1:\d+/", served.stdout.readline())
            assert found
            yield found[0]
        finally:
            served.send_signal(signal.SIGINT)
            _, err = served.communicate(timeout=30)
    assert served.returncode == 0
    assert "error" not in err.lower().replace("will be an error", "")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(params=[(1280, "light"), (390, "dark")], ids=["wide-light", "narrow-dark"])
def page(address: str, browser: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The page, wide and narrow; whatever it asks for, it asks of this machine."""
    width, scheme = request.param
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    opened, hosts, problems = context.new_page(), set(), list[str]()
    opened.on("request", lambda asked: hosts.add(asked.url.split("/")[2]) if asked.url.startswith("http") else None)
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.goto(address)
    opened.wait_for_selector("#paint")
    opened.fill("#prompt textarea", "a red seven on flower petals")
    opened.locator("#steps input[type=number]").fill("3")
    yield opened
    assert hosts == {address.split("/")[2]}
    assert problems == []
    assert opened.evaluate("document.documentElement.scrollWidth") <= width, "nothing is cut off"
    context.close()


def paint(page: Any) -> None:
    page.click("#paint")
    page.wait_for_selector("text=Done in", timeout=DONE)
    page.wait_for_function("document.querySelectorAll('.card .picture img').length == 2")


def sources(page: Any) -> list[str]:
    found: list[str] = page.evaluate("[...document.querySelectorAll('.card .picture img')].map(each => each.src)")
    return found


def test_a_click_makes_pictures_that_can_be_enlarged_wiped_and_kept(page: Any, tmp_path: Path) -> None:
    paint(page)
    wide = page.evaluate("document.querySelector('.card .picture img').getBoundingClientRect().width")
    assert wide > 140, "small pictures are enlarged"
    page.click("#zoom label:has-text('16 to 1')")
    page.wait_for_function("document.querySelector('.card .picture img').getBoundingClientRect().width == 1024")
    page.evaluate("document.querySelector('.card .image-container').scrollTo(300, 200)")
    page.wait_for_function(
        "[...document.querySelectorAll('.card .image-container')].every(each => each.scrollLeft == 300)"
    )
    page.click("#zoom label:has-text('fit')")
    assert page.locator("#wipe img").count() == 2
    with page.expect_download() as download:
        page.locator(".card a.download-link").last.click()
    download.value.save_as(tmp_path / "picture.png")
    assert download.value.suggested_filename == "000000-a-red-seven-on-flower-petals-pixel.png"
    assert read_settings(tmp_path / "picture.png")["steps"] == 3


def test_the_slider_goes_through_the_steps(page: Any) -> None:
    paint(page)
    last = sources(page)
    number = page.locator("#at input[type=number]")
    number.fill("1")
    number.press("Enter")
    page.wait_for_selector("text=after step 1")
    page.wait_for_function(
        "[...document.querySelectorAll('.card .picture img')].every(each => each.src.includes('step-0001'))"
    )
    number.fill("4")
    number.press("Enter")
    page.wait_for_selector("text=The finished pictures")
    page.wait_for_function(
        "![...document.querySelectorAll('.card .picture img')].some(each => each.src.includes('step-'))"
    )
    assert sources(page) == last


def test_a_run_is_stopped_and_a_mistake_is_explained(page: Any) -> None:
    page.locator("#steps input[type=number]").fill("100")
    for side in ("Width", "Height"):
        page.get_by_label(side).first.fill("256")  # so that a busy browser keeps up with the steps
    page.click("#paint")
    page.wait_for_selector("text=/step [2-9] of 100/", timeout=DONE)
    page.click("#stop")
    page.wait_for_selector("text=Stopped.", timeout=DONE)
    page.get_by_label("Width").first.fill("60")
    page.click("#paint")
    page.wait_for_selector("[role=alert]:has-text('not a multiple of the 8 pixels of one token')", timeout=DONE)


def test_three_models_have_pictures_of_one_width(page: Any) -> None:
    card = ":has(> .card)"
    page.evaluate(f"document.querySelector('{card}').append(document.querySelector('.card').cloneNode(true))")
    widths = page.evaluate("[...document.querySelectorAll('.card')].map(each => each.getBoundingClientRect().width)")
    assert len(widths) == 3
    assert len(set(widths)) == 1


def test_what_the_chosen_model_cannot_do_is_hidden(page: Any) -> None:
    page.wait_for_selector("#clamp:visible")
    page.get_by_label("pixel", exact=True).first.uncheck()
    page.wait_for_selector("#clamp", state="hidden")
    assert page.locator(".card:visible").count() == 1


def test_a_picture_to_start_from_is_shown_and_one_that_is_none_is_named(page: Any, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (96, 80), "orange").save(tmp_path / "orange.png")
    (tmp_path / "broken.png").write_text("no picture")
    page.click("#pictures button")
    page.set_input_files("#image input[type=file]", tmp_path / "broken.png")
    page.wait_for_selector("[role=alert]:has-text('broken.png')", timeout=DONE)
    assert str(tmp_path) not in page.inner_text("#status")
    page.locator("#image button[aria-label='Clear'], #image button[aria-label='Remove this file']").first.click()
    page.set_input_files("#image input[type=file]", tmp_path / "orange.png")
    page.wait_for_selector("#pictures img", timeout=DONE)
    paint(page)
