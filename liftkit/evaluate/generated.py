"""What a folder of generated images was made with: all that an image depends on, and whether a run may go on with the folder."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from liftkit.checkpoint.files import expanded, write_text
from liftkit.checkpoint.folder import manifest, tree_size
from liftkit.checkpoint.hashing import CHOSEN, OLDER, hexadecimal, word
from liftkit.checkpoint.leftovers import is_leftover
from liftkit.checkpoint.model import ModelFolder, read_json
from liftkit.errors import UsageError
from liftkit.evaluate.cache import digest, tensor_digest
from liftkit.evaluate.layouts import Files, Layout, Numbered
from liftkit.models.adapter import Adapter
from liftkit.options import GenerateOptions
from liftkit.progress import Observer

RECORD = "generate.json"
SCHEMA = "liftkit.generated/1"


def check_folder(output: Path) -> None:
    """Raise unless images may be written to a folder, as far as looking can say.

    Raises:
        UsageError: if it is a file, its parent is not there, or it holds files that no run of this command wrote.
    """
    if output.exists() and not output.is_dir():
        raise UsageError(f"{output}: is a file; the output is a folder")
    if not output.absolute().parent.is_dir():
        raise UsageError(f"{output.absolute().parent}: no such folder; make it first")
    # A run that was killed while it wrote its record leaves that half written.
    if output.is_dir() and not (output / RECORD).is_file() and not all(is_leftover(path) for path in output.iterdir()):
        raise UsageError(f"{output}: holds files but no {RECORD}; choose another output")


def settings_of(
    model: ModelFolder,
    files: Files,
    options: GenerateOptions,
    observer: Observer,
    adapter: Adapter | None,
    there: dict[str, Any],
) -> dict[str, Any]:
    """All that an image depends on, its number aside; digests by the hash of the settings that are there already."""
    prompts = files.prompts if isinstance(files, Numbered) else [each.prompt for each in files.items]
    older = ":" not in str(there.get("model_digest", ":"))
    return {
        "model": model.name,
        "model_digest": _model_digest(model, OLDER if older else CHOSEN, observer),
        "prompts": len(prompts),
        "prompts_digest": hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
        "seed": options.seed,
        "steps": options.steps,
        "height": options.height,
        "width": options.width,
        **options.record,
        **({} if adapter is None else {"adapter": _digest(adapter)}),
        **_pictures_digest(options),
        **({"layout": files.name, "layout_digest": files.digest} if isinstance(files, Layout) else {}),
    }


def _model_digest(model: ModelFolder, algorithm: str, observer: Observer) -> str:
    """Of the index and all files of the components."""
    parts = [path for name in sorted(model.components) if (path := model.path / name).is_dir()]
    found = hashlib.sha256(json.dumps(model.index, sort_keys=True).encode())
    with observer.stage("generate: reading the model", sum(map(tree_size, parts)), "bytes") as advance:
        for part in parts:
            digests = manifest(part, advance, algorithm)
            found.update(json.dumps({name: hexadecimal(digest) for name, digest in digests.items()}).encode())
    return found.hexdigest() if algorithm == OLDER else word(algorithm, found.hexdigest())


def _pictures_digest(options: GenerateOptions) -> dict[str, str]:
    """Of the pictures that are started from or looked at; they may change where they lie."""
    pictures = options.pictures
    paths = [*([] if pictures.image is None else [pictures.image]), *pictures.references]
    found = hashlib.sha256()
    for path in paths:
        found.update(hashlib.sha256(expanded(path).read_bytes()).digest())
    return {"pictures_digest": found.hexdigest()} if paths else {}


def _digest(adapter: Adapter) -> str:
    """Of all tensors of an adapter and its lift."""
    found = {name: tensor_digest(tensor) for name, tensor in sorted(adapter.tensors.items())}
    lift = None if adapter.lift is None else [tensor_digest(adapter.lift.basis), adapter.lift.scale]
    return digest([found, adapter.alpha, lift, adapter.provenance.get("sampling")])


def made_with(path: Path) -> dict[str, Any]:
    """The settings that the images in a folder were made with; empty where there are none yet.

    Raises:
        UsageError: if the file is of another schema.
    """
    if not path.is_file():
        return {}
    record = read_json(path)
    if record.get("schema") != SCHEMA or not isinstance(record.get("settings"), dict):
        raise UsageError(f"{path}: expected the schema {SCHEMA}, found {record.get('schema')!r}; choose another output")
    found: dict[str, Any] = record["settings"]
    return found


def check_settings(output: Path, settings: dict[str, Any], there: dict[str, Any]) -> None:
    """Raise unless a folder has no images yet, or images of the same settings.

    Raises:
        UsageError: naming the first setting that differs.
    """
    if not there:
        return
    # A model may be called by another path; its digest says whether it is the same.
    differing = [name for name in {**settings, **there} if name != "model" and there.get(name) != settings.get(name)]
    if differing:
        name = differing[0]
        raise UsageError(
            f"{output}: its images were made with other settings ({name}: {there.get(name)} there, "
            f"{settings.get(name)} now); repeat those or choose another output"
        )


def begin(output: Path, record: dict[str, Any]) -> None:
    """Write what the images of a folder are made with, unless it is there already."""
    if not (output / RECORD).is_file():
        write_text(output / RECORD, json.dumps(record, indent=2) + "\n")
