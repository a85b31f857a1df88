"""``liftkit doctor``: does this machine have what liftkit needs?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from liftkit.cli import console

if TYPE_CHECKING:
    from liftkit.environment import Environment

Rows = list[tuple[str, str]]


def doctor() -> None:
    """Check that this machine has what liftkit needs.

    It shows versions, devices, memory, disk and the Hub's cache; nothing is downloaded or written.

    Exit code 0 if all is well, 1 if something that liftkit needs is missing or too old; it says what to do.

    Example: liftkit doctor
    """
    console.first_word("looking at this machine")
    from liftkit.environment import examine

    found = examine()
    console.result(**found.to_dict())
    for title, rows in (
        ("Versions", _versions(found)),
        ("Optional", _optional(found)),
        ("Devices", _devices(found)),
        ("Machine", _machine(found)),
    ):
        console.table(title, rows)
    for note in found.notes:
        console.note(note)
    for problem in found.problems:
        console.fail(problem)
    if found.problems:
        raise typer.Exit(1)
    console.out.print("liftkit has all that it needs")


def _versions(found: Environment) -> Rows:
    rows = [("liftkit", found.liftkit), ("python", f"{found.python} on {found.platform}")]
    for package in found.packages:
        wrong = f" (needed: {package.needed or 'any'})" if package.problem else ""
        rows.append((package.name, (package.version or "not installed") + wrong))
    return rows


def _optional(found: Environment) -> Rows:
    from liftkit.environment import OPTIONAL

    missing = {name: f"not installed ({use}): pip install {what}" for name, (what, use) in OPTIONAL.items()}
    return [(name, version or missing[name]) for name, version in found.optional.items()]


def _devices(found: Environment) -> Rows:
    rows = []
    for each in found.devices:
        parts = [each["name"], *([f"compute {each['compute']}"] if each["compute"] else []), _room(each)]
        rows.append((each["device"], ", ".join(parts)))
    return [*rows, ("--device auto", found.device or "unknown: torch is not usable")]


def _room(device: dict[str, Any]) -> str:
    """Memory of a device, as far as it is known."""
    if device["memory"] is None:
        return "memory unknown"
    free = "" if device["free"] is None else f", {console.size(device['free'])} free"
    return f"{console.size(device['memory'])}{free}"


def _machine(found: Environment) -> Rows:
    threads = found.threads
    asked = f", OMP_NUM_THREADS={threads['OMP_NUM_THREADS']}" if threads["OMP_NUM_THREADS"] else ""
    rows = [("threads", f"{threads['usable']} of {threads['cpus']} CPUs, torch takes {threads['torch']}{asked}")]
    for name, title in (("here", "disk here"), ("cache", "disk of the cache")):
        if name in found.disk:
            disk = found.disk[name]
            rows.append((title, f"{console.size(disk['free'])} free of {console.size(disk['total'])} ({disk['path']})"))
    if found.hub:
        rows.append(("Hub", "offline (HF_HUB_OFFLINE)" if found.hub["offline"] else "online"))
        rows.append(("Hub token", f"set, by {found.hub['token']}" if found.hub["token"] else "none"))
    return rows
