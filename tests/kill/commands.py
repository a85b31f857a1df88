"""The commands that are killed, and what must hold of what they leave."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from liftkit.checkpoint.lock import LOCK, SUFFIX
from liftkit.embedded import TINY_KLEIN
from liftkit.lift import Lift
from tests.kill.zygote import Ran, Zygote

ADVICE = re.compile(r"by:? liftkit (finetune --resume \S+?)(,|$|\n)")
"""The command that a message names, where the same one is not the way on."""
DEMO = "data.sources=[{kind: demo, count: 4}]"
SHORT = ["batch_size=2", DEMO, "validation.every=0", "save=adapter", "trainable.rank=2", "objective.adversarial=0"]


@dataclass(frozen=True)
class Command:
    """One command to kill.

    Args:
        name: of it.
        arguments: of the command line, relative to the folder that it runs in.
        whole: outputs that are absent, old or complete at any time.
        parts: outputs that are filled in place: each of their files that a run promises to the bit, by pattern.
        next: what to run after a kill; the same by default.
        old: fills the folder before, for outputs that are replaced.
    """

    name: str
    arguments: list[str]
    whole: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    next: list[str] | None = None
    old: Callable[[Path, Path], None] = field(default=lambda folder, stock: None)


@dataclass
class Outcome:
    """What one kill left.

    Args:
        state: ``absent``, ``old``, ``complete`` or ``begun``, or ``mixture``.
        fault: what was wrong, in words; None if nothing was.
        dead_end: whether the next command did not lead out.
    """

    state: str
    fault: str | None = None
    dead_end: bool = False


def commands(stock: Path) -> list[Command]:
    """All commands.

    Args:
        stock: a folder made by :func:`prepare`.
    """
    model = f"model={stock / 'pixel'}"
    convert = ["convert", str(TINY_KLEIN), "--lift", str(stock / "lift.safetensors"), "--device", "cpu"]
    convert += ["--proof", "projections", "-o", "out"]
    tune = ["finetune", "tiny-klein", model, *SHORT, "checkpoints.keep=2"]
    return [
        Command("convert", convert, whole=("out",)),
        Command("convert --overwrite", [*convert, "--overwrite"], whole=("out",), old=_old_conversion),
        Command("import", ["import", str(stock / "adapter"), "--base", str(TINY_KLEIN), "-o", "out"], whole=("out",)),
        Command("export", ["export", str(stock / "pixel"), "--format", "adapter", "-o", "out"], whole=("out",)),
        Command(
            "fit",
            [
                "fit",
                str(TINY_KLEIN),
                "--images",
                "demo",
                "--num-images",
                "8",
                "--device",
                "cpu",
                "-o",
                "lift.safetensors",
            ],
            whole=("lift.safetensors",),
        ),
        Command(
            "finetune",
            [*tune, "steps=3", "checkpoints.every=1", "previews.every=0", "-o", "run"],
            whole=("run/adapter",),
            parts=("run/checkpoints/*/parameters.safetensors", "run/checkpoints/*/optimizer.safetensors"),
        ),
        Command(
            "generate",
            ["generate", "demo", "--prompts", "demo", "-n", "3", "--steps", "1", "--batch-size", "2", "-o", "made"],
            parts=("made/*.png", "made/generate.json"),
        ),
        Command(
            "filling a cache",
            [*tune, "steps=1", "previews.every=0", f"data.cache={Path('cache')}", "-o", "first"],
            whole=("first/adapter",),
            next=[*tune, "steps=1", "previews.every=0", f"data.cache={Path('cache')}", "-o", "second"],
        ),
    ]


def prepare(zygote: Zygote, stock: Path) -> None:
    """What the commands read: a lift, a conversion, and one of another lift to be replaced."""
    demo = ["--images", "demo", "--device", "cpu"]
    to = ["--proof", "projections", "--device", "cpu", "-o"]
    made = [
        ["fit", str(TINY_KLEIN), *demo, "--num-images", "8", "-o", "lift.safetensors"],
        ["convert", str(TINY_KLEIN), "--lift", "lift.safetensors", *to, "pixel"],
        ["convert", str(TINY_KLEIN), "--lift", "lift.safetensors", "--dtype", "bfloat16", *to, "old"],
        ["export", "pixel", "--format", "adapter", "-o", "adapter"],
    ]
    for arguments in made:
        done = zygote.run(arguments, stock)
        assert done.code == 0, done.output
        if arguments[0] == "fit":
            # Without its figures: the pages of pictures that they make are most of the work of a small conversion.
            lift = Lift.load(stock / "lift.safetensors")
            replace(lift, figures={}).save(stock / "lift.safetensors")


@dataclass
class Reference:
    """A command that nobody killed.

    Args:
        events: of it.
        whole, parts: digests of its outputs by path.
        final: the same of what the next command leaves.
        old: digests of what was there before.
    """

    events: int
    whole: dict[str, str]
    parts: dict[str, set[str]]
    final: dict[str, str]
    old: dict[str, str]


def reference(zygote: Zygote, command: Command, stock: Path, folder: Path) -> Reference:
    """Run a command to its end, twice where another follows: the first time imports what it needs."""
    for turn in range(2):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        command.old(folder, stock)
        old = digests(folder, command.whole)
        every = list(command.arguments)
        if command.name == "finetune":
            # Rotation would remove what a killed run may still have.
            every += ["checkpoints.keep=99"]
        done = zygote.run(every if turn == 0 else command.arguments, folder)
        assert done.code == 0, done.output
        if turn == 0:
            parts = _by_name(folder, command.parts)
    whole = digests(folder, command.whole)
    if command.next is not None:
        after = zygote.run(command.next, folder)
        assert after.code == 0, after.output
    return Reference(done.events, whole, parts, final(folder, command), old)


def killed(zygote: Zygote, command: Command, stock: Path, folder: Path, expected: Reference, event: int) -> Outcome:
    """Kill a command at an event, look at what it left, and run the next one."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    command.old(folder, stock)
    ran = zygote.run(command.arguments, folder, event)
    assert ran.code in (-9, 0), ran.output
    outcome = look(command, folder, expected)
    if outcome.fault is not None:
        return outcome
    return end(zygote, command, folder, expected, outcome)


def killed_in_turn(
    zygote: Zygote, command: Command, stock: Path, folder: Path, expected: Reference, events: Iterable[int]
) -> list[Outcome]:
    """Kill a command, and what goes on from there, and so on; the last one may end. Of outputs that are complete it begins
    anew."""
    outcomes: list[Outcome] = []
    fresh = True
    for event in events:
        if fresh:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            command.old(folder, stock)
        ran = _go_on(zygote, command.arguments, folder, event)
        outcomes.append(look(command, folder, expected))
        fresh = ran.code != -9
        if ran.code not in (-9, 0):
            outcomes.append(Outcome("begun", f"no way on: {ran.output}", dead_end=True))
    outcomes.append(end(zygote, command, folder, expected, outcomes[-1]))
    return outcomes


def end(zygote: Zygote, command: Command, folder: Path, expected: Reference, outcome: Outcome) -> Outcome:
    """Let the next command end, and compare what there is then with a run that nobody killed."""
    after = _go_on(zygote, command.next or command.arguments, folder)
    if after.code != 0:
        return Outcome(outcome.state, f"no way on: {after.output}", dead_end=True)
    left = [path for path in folder.rglob(".*") if path.name.endswith((SUFFIX, LOCK, ".part"))]
    if command.next is not None:
        # Another run has come by, in a folder of its own: what it shares is the cache.
        left = [path for path in left if path.relative_to(folder).parts[0] != "first"]
    if left:
        return Outcome(outcome.state, f"left: {', '.join(map(str, left))}")
    found = final(folder, command)
    if found != expected.final:
        odd = sorted(
            name for name in found.keys() | expected.final.keys() if found.get(name) != expected.final.get(name)
        )
        return Outcome("mixture", f"other bits than a run that was not killed: {', '.join(odd)}")
    return outcome


def look(command: Command, folder: Path, expected: Reference) -> Outcome:
    """What stands in the folder after a kill."""
    whole = digests(folder, command.whole)
    for path, digest in _by_name(folder, command.parts).items():
        if not digest <= expected.parts.get(path, set()):
            return Outcome("mixture", f"{path} is not what a run that was not killed makes")
    if whole == expected.whole and whole:
        return Outcome("complete")
    if whole == expected.old and whole:
        return Outcome("old")
    if whole:
        return Outcome("mixture", f"neither old nor new: {sorted(whole)}")
    seen = [
        path for path in folder.rglob("[!.]*") if path.is_file() and "/." not in str(path.relative_to(folder.parent))
    ]
    return Outcome("begun" if seen else "absent")


def _go_on(zygote: Zygote, arguments: list[str], folder: Path, kill: int = 0) -> Ran:
    """A command, or what its message names where it is refused."""
    done = zygote.run(arguments, folder, kill)
    if done.code == 2 and "exists already" in done.output:
        # A complete output is what was wanted.
        return Ran(0, done.events, done.output)
    named = ADVICE.search(done.output) if done.code == 2 else None
    return done if named is None else zygote.run(named[1].split(), folder, kill)


def _old_conversion(folder: Path, stock: Path) -> None:
    shutil.copytree(stock / "old", folder / "out", copy_function=os.link)


def final(folder: Path, command: Command) -> dict[str, str]:
    """Digests of all that a command promises to the bit, once it is done."""
    if command.next is not None:
        return digests(folder, ("second/adapter",))
    parts = [path.relative_to(folder).as_posix() for pattern in command.parts for path in folder.glob(pattern)]
    return digests(folder, (*command.whole, *parts))


def digests(folder: Path, outputs: Iterable[str]) -> dict[str, str]:
    """SHA-256 of the files of outputs, by path."""
    found = {}
    for name in outputs:
        place = folder / name
        for path in [place] if place.is_file() else sorted(place.rglob("*")):
            if path.is_file():
                found[path.relative_to(folder).as_posix()] = _digest(path)
    return found


def _by_name(folder: Path, patterns: Iterable[str]) -> dict[str, set[str]]:
    return {
        path.relative_to(folder).as_posix(): {_digest(path)}
        for pattern in patterns
        for path in folder.glob(pattern)
        if SUFFIX not in str(path.relative_to(folder))
    }


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
