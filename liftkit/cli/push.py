"""``--push`` and ``--public``, of every command that makes a folder worth publishing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from liftkit.cli import console
from liftkit.options import Option

Push = Annotated[
    str | None,
    Option(
        "Hub repository (organization/name) to publish the result in, private; the token is HF_TOKEN's or that of hf auth login.",
        "REPO",
        default="not published",
    ),
]
Public = Annotated[bool, Option("Make the repository of --push public.")]


def check(repo: str | None, public: bool) -> None:
    """Raise, before any work, unless what is asked for could be pushed."""
    if repo is not None:
        from liftkit.hub import check_push

        check_push(repo, private=not public)
    elif public:
        from liftkit.errors import UsageError

        raise UsageError("--public: says how to push, and nothing is pushed; give --push REPO")


def send(folder: Path, repo: str | None, public: bool) -> None:
    """Push a folder, if asked to."""
    if repo is not None:
        from liftkit.hub import push

        address = push(folder, repo, private=not public, observer=console.Bars())
        console.result(pushed=address)
        console.out.print(f"pushed to {address} ({'public' if public else 'private'})")
