"""Whether a folder would load: everything is built, and no weight is read."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

from liftkit.checkpoint.components import LATENT_VAE, read_components
from liftkit.checkpoint.model import ModelFolder, find_model
from liftkit.errors import LiftkitError, UsageError
from liftkit.models.load import MissingPackageError, load_component, load_pipeline


def try_loading(folder: ModelFolder) -> list[str]:
    """What :func:`cannot_load` says; of another process where the libraries are not in this one's memory yet, for they take
    more of it than a conversion does.

    Raises:
        UsageError: see :func:`cannot_load`.
        LiftkitError: if the other process was killed.
    """
    if "diffusers" in sys.modules:
        return cannot_load(folder)
    asked = [sys.executable, "-P", "-m", "liftkit.models.trial", str(folder.path.absolute()), folder.source]
    done = subprocess.run(asked, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        raise LiftkitError(f"{folder.source}: the process that tries to load it ended with {done.returncode} ({last})")
    answer = json.loads(done.stdout.splitlines()[-1])
    if "error" in answer:
        raise UsageError(answer["error"])
    return list(answer["lacks"])


def cannot_load(folder: ModelFolder) -> list[str]:
    """Build everything that a folder holds, without reading its weights, to find out what would not load.

    Returns:
        What this machine lacks to load it, each on one line; nothing if all is well.

    Raises:
        UsageError: naming the component that is incomplete, or that its library cannot load.
    """
    quantized = tuple(part.name for part in read_components(folder) if part.quantized)
    try:
        load_pipeline(folder, device="meta", without=quantized)
        if (folder.path / LATENT_VAE).is_dir():
            load_component(folder, LATENT_VAE, device="meta")
    except MissingPackageError as error:
        return [f"it cannot be sampled or finetuned on this machine: {error}"]
    return []


def _main(path: str, source: str) -> None:
    """The other process of :func:`try_loading`: one line of JSON."""
    try:
        answer: dict[str, Any] = {"lacks": cannot_load(replace(find_model(path), source=source))}
    except UsageError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer))


if __name__ == "__main__":
    _main(*sys.argv[1:])
