"""The files that a conversion reads: those that come along, and that none of them is written over."""

from __future__ import annotations

import os
from collections.abc import Container
from pathlib import Path

from liftkit.checkpoint.components import LATENT_VAE, Component
from liftkit.checkpoint.files import expanded
from liftkit.checkpoint.model import ModelFolder
from liftkit.checkpoint.source import check_at_home
from liftkit.embedded import MODELS
from liftkit.errors import UsageError
from liftkit.tally import Tally


def copied_files(
    model: ModelFolder, parts: list[Component], companions: Container[str] = ()
) -> tuple[dict[str, Path], dict[str, str], Tally]:
    """What comes along of a source: every component that is not made anew, the original VAE beside the new model, and the
    license.

    Returns:
        Files by their path in the output, texts of those that are written anew (indexes of shards whose names change), and
        what was left out.

    Raises:
        UsageError: naming a license that is a link out of the model.
    """
    files: dict[str, Path] = {}
    texts: dict[str, str] = {}
    tally = Tally("files")
    for part in parts:
        tally += part.left_out
        if part.name not in ("transformer", "scheduler") and part.name not in companions:
            place = LATENT_VAE if part.name == "vae" else part.name
            files |= {f"{place}/{name}": path for name, path in part.files.items()}
            texts |= {f"{place}/{name}": text for name, text in part.index.items()}
    licenses = [path for path in sorted(model.path.glob("LICENSE*")) if path.is_file()]
    for path in licenses:
        check_at_home(path, model.home)
    files |= {path.name: path for path in licenses}
    tally.use(len(files) + len(texts))
    return files, texts, tally


def check_apart(output: Path, inputs: dict[str, Path | str | None]) -> None:
    """Raise unless the output is none of the inputs, holds none and lies in no model: an input stays as it is.

    Raises:
        UsageError: naming the input.
    """
    target = Path(os.path.realpath(output))
    for name, path in inputs.items():
        if path is None or path in MODELS:
            continue
        source = Path(os.path.realpath(expanded(path)))
        if source == target or target in source.parents:
            raise UsageError(f"{output}: holds {name} ({path}); choose another output")
        if source in target.parents and (source / "model_index.json").is_file():
            raise UsageError(f"{output}: inside of {name} ({path}), which stays as it is; choose another output")
