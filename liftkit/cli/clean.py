"""``liftkit clean``: delete what a finished run no longer needs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from liftkit.cli import console
from liftkit.options import Argument, Option


def clean(
    run: Annotated[Path, Argument("Run folder of a finished liftkit finetune.", "FOLDER", names="folder")],
    dry_run: Annotated[bool, Option("Print what would be deleted, delete nothing, and stop.")] = False,
) -> None:
    """Delete checkpoints and cache of a finished run.

    The result, the recipe, the log and the previews stay.

    Example: liftkit clean runs/photos --dry-run
    """
    console.first_word(f"reading {run}")
    from liftkit.finetune.clean import clean as delete
    from liftkit.finetune.clean import leftovers

    found = leftovers(run)
    files = [str(path) for path in found.files]
    size = found.size
    if not dry_run:
        size = delete(run)
    console.result(run=run, dry_run=dry_run, files=files, bytes=size)
    done = "would go" if dry_run else "are gone"
    console.out.print(
        f"{run}: {len(found.checkpoints)} files of checkpoints and {len(found.cache)} of the cache {done} "
        f"({console.size(size)}); the result stays, but the run can no longer go on from where it ended"
    )
