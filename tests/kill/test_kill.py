"""Commands killed at their file events: outputs are absent, old or complete, and the next command leads out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kill.commands import Command, commands, end, killed, killed_in_turn, look, prepare, reference
from tests.kill.zygote import Zygote

NAMES = [each.name for each in commands(Path())]
KILLS = 10
LONG = ("filling a cache", "import")


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    with Zygote() as process:
        yield process


@pytest.fixture(scope="module")
def stock(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stock").resolve()
    prepare(zygote, folder)
    return folder


def find(name: str, stock: Path) -> Command:
    return next(each for each in commands(stock) if each.name == name)


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in LONG else ()) for name in NAMES])
def test_killed_in_turn(name: str, zygote: Zygote, stock: Path, tmp_path: Path) -> None:
    """Ten kills, each in what the one before has left."""
    command, folder = find(name, stock), tmp_path.resolve() / "work"
    expected = reference(zygote, command, stock, folder)
    events = [1 + (number * expected.events) // KILLS for number in range(KILLS)]
    outcomes = killed_in_turn(zygote, command, stock, folder, expected, events)
    assert [each.fault for each in outcomes if each.fault] == []
    assert {each.state for each in outcomes} - {"complete"}, "a command that nobody killed says nothing"


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_killed_at_each_event(name: str, zygote: Zygote, stock: Path, tmp_path: Path) -> None:
    command, folder = find(name, stock), tmp_path.resolve() / "work"
    expected = reference(zygote, command, stock, folder)
    for event in range(1, expected.events + 1):
        outcome = killed(zygote, command, stock, folder, expected, event)
        assert outcome.fault is None, f"event {event}: {outcome.fault}"


def test_a_runner_that_kills_sees_what_is_wrong(zygote: Zygote, stock: Path, tmp_path: Path) -> None:
    """A mixture, a leftover and a dead end are found."""
    command, folder = find("export", stock), tmp_path.resolve() / "work"
    expected = reference(zygote, command, stock, folder)
    (folder / "out" / "README.md").write_text("other")
    mixture = look(command, folder, expected)
    assert mixture.state == "mixture"
    assert end(zygote, command, folder, expected, mixture).state == "mixture"
    (folder / "out" / "liftkit.json").unlink()
    for path in sorted((folder / "out").rglob("*"), reverse=True):
        path.unlink()
    (folder / "out").rmdir()
    (folder / "out").write_text("a file in the way")
    assert end(zygote, command, folder, expected, mixture).dead_end
