"""Progress lines: what they show in terminals of any width, and where there is none."""

from __future__ import annotations

import io
import time
from typing import Any

import pytest
from rich.cells import cell_len

from liftkit.cli.bars import Bars, PlainLines, Stage, clock_text
from liftkit.cli.terminal import SafeConsole

STATUS = "loss 2.727  20.2 images/s  1 image left out"


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def shown(stage: Stage, width: int) -> str:
    stream = io.StringIO()
    SafeConsole(file=stream, width=width, force_terminal=True, color_system=None).print(stage)
    return stream.getvalue().rstrip("\n")


def half_way(title: str = "finetune", before: int = 0) -> Stage:
    """169 of 600 steps, four a second; ``before`` of them by an earlier run."""
    clock = Clock()
    stage = Stage(title, 600, "steps", clock)
    if before:
        stage.advance(before)
    for _ in range(169 - before):
        clock.now += 0.25
        stage.advance(1)
        stage.status = STATUS
    return stage


@pytest.mark.parametrize("title", ["finetune", "control: real images through the VAE of the latent model"])
@pytest.mark.parametrize("width", [*range(60, 200, 7), 400])
def test_steps_and_times_are_there_at_any_width(width: int, title: str) -> None:
    line = shown(half_way(title), width)
    assert "\n" not in line
    assert cell_len(line) <= width
    assert "169/600 steps  0:42 elapsed  1:47 left" in line
    assert line[2:10] == title[:8]
    if width >= 110 + len(title):
        assert line.endswith(f"4.0 steps/s  {STATUS}")


def test_what_an_earlier_run_did_is_no_speed() -> None:
    stage = half_way(before=160)
    assert stage.rate == pytest.approx(4.0)
    assert "169/600 steps  0:02 elapsed  1:47 left" in shown(stage, 80)


def test_the_rate_is_that_of_the_last_half_minute() -> None:
    stage = half_way()
    for _ in range(20):
        stage.clock.now += 2.0  # type: ignore[attr-defined]
        stage.advance(1)
    assert stage.rate == pytest.approx(0.5)
    assert stage.more().startswith("30.0 steps/min")


@pytest.mark.parametrize(
    ("unit", "total", "amounts", "text"),
    [
        ("bytes", 6.4e6, [3.2e6], "3.2 MB/6.4 MB  0:01 elapsed  -:-- left"),
        ("bytes", 6.4e6, [1.6e6, 1.6e6], "3.2 MB/6.4 MB  0:02 elapsed  0:02 left  1.6 MB/s"),
        ("images", None, [3, 4], "7 images  0:02 elapsed  4.0 images/s"),
        ("steps", 1, [], "0/1 steps  0:00 elapsed  -:-- left"),
    ],
)
def test_what_is_not_known_is_not_made_up(unit: str, total: float | None, amounts: list[float], text: str) -> None:
    clock = Clock()
    stage = Stage("work", total, unit, clock)
    for amount in amounts:
        clock.now += 1.0
        stage.advance(amount)
    assert stage.plain() == f"work  {text}"


def test_spans_of_time() -> None:
    assert [clock_text(span) for span in (None, 0, 65.9, 3600, 100 * 3600)] == [
        "-:--", "0:00", "1:05", "1:00:00", "100:00:00",
    ]  # fmt: skip


def plain_lines(seconds: list[float], **choices: Any) -> list[str]:
    """Lines of a stage without a terminal, that advances after each of these seconds."""
    stream, clock = io.StringIO(), Clock()
    bars = Bars(SafeConsole(file=stream, width=40), print, clock=clock, **choices)
    with bars.stage("finetune", len(seconds), "steps") as advance:
        for span in seconds:
            clock.now += span
            bars.status(STATUS)
            advance(1)
    return stream.getvalue().splitlines()


def test_without_a_terminal_a_line_comes_soon_and_then_now_and_then() -> None:
    lines = plain_lines([1.0] * 60)
    assert [line.split()[1] for line in lines] == ["2/60", "17/60", "32/60", "47/60", "60/60"]
    assert lines[1] == f"finetune  17/60 steps  0:17 elapsed  0:43 left  1.0 steps/s  {STATUS}"
    assert lines[-1] == f"finetune  60/60 steps  1:00 elapsed  1.0 steps/s  {STATUS}"
    assert plain_lines([1.0] * 60, quiet=True) == []


def test_a_short_stage_is_one_line_and_slow_steps_are_a_line_each() -> None:
    assert len(plain_lines([0.1] * 10)) == 1
    assert [line.split()[1] for line in plain_lines([40.0] * 3)] == ["1/3", "2/3", "3/3"]


def test_a_step_that_takes_minutes_has_a_line_every_15_seconds() -> None:
    stream, clock = io.StringIO(), Clock()
    stage = Stage("score", 3, "rows", clock)
    lines = PlainLines(stage, SafeConsole(file=stream), every=15.0)
    for _ in range(60):
        clock.now += 1.0
        lines.beat()
    lines.advance(1)
    for _ in range(20):
        clock.now += 1.0
        lines.beat()
    lines.end()
    clock.now += 100.0
    lines.beat()
    shown = [line.split()[1:4:2] for line in stream.getvalue().splitlines()]
    assert shown == [
        ["0/3", "0:15"], ["0/3", "0:30"], ["0/3", "0:45"], ["0/3", "1:00"], ["1/3", "1:15"], ["1/3", "1:20"],
    ]  # fmt: skip


def test_the_heartbeat_needs_no_work_to_advance_and_stops_with_its_stage() -> None:
    stream = io.StringIO()
    with Bars(SafeConsole(file=stream), print, every=0.02).stage("score", 3, "rows"):
        deadline = time.monotonic() + 10
        while stream.getvalue().count("0/3 rows") < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    lines = stream.getvalue()
    assert lines.count("0/3 rows") >= 2
    time.sleep(0.1)
    assert stream.getvalue() == lines


def test_a_stage_that_fails_says_how_far_it_came() -> None:
    stream, clock = io.StringIO(), Clock()
    bars = Bars(SafeConsole(file=stream), print, clock=clock)

    def fail() -> None:
        with bars.stage("encode", 9, "images") as advance:
            advance(4)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert stream.getvalue() == "encode  4/9 images  0:00 elapsed  -:-- left\n"


def test_in_a_terminal_the_line_stands_still_and_notes_go_above() -> None:
    stream, clock = io.StringIO(), Clock()
    console = SafeConsole(file=stream, width=60, force_terminal=True, color_system=None)
    bars = Bars(console, console.print, clock=clock)
    with bars.stage("encode", 9, "images") as advance:
        advance(9)
        bars.note("a note")
    text = stream.getvalue()
    assert "a note\n" in text
    assert "\x1b[2K✓ encode  9/9 images  0:00 elapsed  ━" in text
