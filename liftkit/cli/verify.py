"""``liftkit verify``: is a converted folder whole, and does it do what its source does?"""

from __future__ import annotations

from typing import Annotated

import typer

from liftkit.cli import console
from liftkit.options import Argument, Option


def verify(
    folder: Annotated[str, Argument("Folder that liftkit convert made.", "FOLDER", names="folder")],
    source: Annotated[
        str | None,
        Option(
            "Model that the folder was made from; every unchanged tensor is compared with its own, byte for byte.",
            "FOLDER",
            default="not compared",
            names="model",
        ),
    ] = None,
) -> None:
    """Check that a converted folder is whole and right.

    It looks at manifest, hashes, shapes and orthonormality, and checks that the folder is source times lift.

    Exit code 0 if all is well, 1 if something is not.

    Example: liftkit verify klein-pixel
    """
    console.first_word(f"reading {folder}")
    from liftkit.conversion.audit import audit

    console.quiet_libraries()
    found = audit(folder, source, console.Bars())
    console.result(**found.to_dict())
    rows = [(check.name, check.detail if check.ok else "FAILED") for check in found.checks]
    console.table(f"Verify {folder}", rows)
    for check in found.checks:
        for problem in check.problems:
            console.fail(f"{check.name}: {problem}")
    if not found.ok:
        raise typer.Exit(1)
