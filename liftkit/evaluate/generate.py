"""Self-generated training data: a model's own samples as a dataset folder of images and captions.

Image i depends on the model, the settings, its prompt and its seed alone, so that an interrupted folder is gone on with
and a finished one can be made larger.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import nullcontext
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

from torch import Tensor

from liftkit.checkpoint.files import atomic_file, expanded, write_text
from liftkit.checkpoint.folder import manifest, tree_size
from liftkit.checkpoint.hashing import CHOSEN, OLDER, hexadecimal, word
from liftkit.checkpoint.leftovers import is_leftover, sweep_inside
from liftkit.checkpoint.lock import claim
from liftkit.checkpoint.model import ModelFolder, read_json
from liftkit.checkpoint.record import versions
from liftkit.color import to_uint8
from liftkit.data.metadata import METADATA_LINES
from liftkit.errors import UsageError
from liftkit.evaluate.cache import digest, tensor_digest
from liftkit.evaluate.layouts import Layout
from liftkit.fit.distributed import Processes
from liftkit.models.adapter import Adapter
from liftkit.models.loaded import Loaded, load_pipeline
from liftkit.models.sampling import check_options, sample
from liftkit.options import GenerateOptions
from liftkit.progress import Observer, Silent

RECORD = "generate.json"
SCHEMA = "liftkit.generated/1"


@dataclass(frozen=True)
class Generated:
    """What a run did.

    Args:
        folder: of the images.
        new: images sampled.
        found: images that an earlier run had made.
    """

    folder: Path
    new: int
    found: int


def generate(
    model: ModelFolder,
    prompts: list[str],
    output: Path,
    options: GenerateOptions,
    observer: Observer | None = None,
    adapter: Adapter | None = None,
    layout: Layout | None = None,
) -> Generated:
    """Sample images into a folder that :class:`CaptionedFolder` and the Hub's ``imagefolder`` read.

    The folder holds ``000000.png`` and so on, ``metadata.jsonl`` (``file_name``, ``text``, ``seed``) and
    ``generate.json``, which says how they were made. A folder of the same settings is gone on with. The processes of an
    ``accelerate launch`` (or torchrun) each take a share of the batches.

    Args:
        model: latent or converted.
        prompts: image i has prompt ``i`` modulo their number.
        output: the folder.
        options: how.
        observer: shows the progress.
        adapter: the one that ``options.adapter`` names, opened.
        layout: names, prompts and grids of a benchmark, in place of ``prompts`` and of the names above.

    Raises:
        UsageError: if the folder holds other files or images of other settings, another run is making it, or the settings
            do not fit the model.
        LiftkitError: if the disk refuses.
    """
    files = Numbered(prompts) if layout is None else layout
    options = replace(options, count=files.count(options))
    # Before the model is placed: each process of a launch has its own device. The first one keeps the folder for all.
    processes = Processes()
    if processes.main:
        _check_folder(output)
    with claim(output, inside=True) if processes.main else nullcontext():
        if processes.main:
            sweep_inside(output)
        return _generate(model, files, output, options, observer or Silent(), adapter, processes)


@dataclass(frozen=True)
class Numbered:
    """A plain dataset folder: numbered images whose prompts take turns."""

    prompts: list[str]

    def count(self, options: GenerateOptions) -> int:
        """Images of the finished folder."""
        if options.count is None:
            raise UsageError("-n: how many images? Only with --layout may it be left out")
        return options.count

    def text(self, index: int) -> str:
        """The prompt of an image."""
        return self.prompts[index % len(self.prompts)]

    def file(self, index: int) -> str:
        """The file of an image within the folder."""
        return f"{index:06d}.png"

    def existing(self, output: Path) -> list[int]:
        """Numbers of the images that are there."""
        return sorted(int(path.stem) for path in output.glob("*.png") if path.stem.isdecimal())


Files = Numbered | Layout


def _generate(
    model: ModelFolder,
    files: Files,
    output: Path,
    options: GenerateOptions,
    observer: Observer,
    adapter: Adapter | None,
    processes: Processes,
) -> Generated:
    count = options.count or 0
    if processes.main:
        there = _made_with(output / RECORD)
        settings = _settings(model, files, options, observer, adapter, there)
        _check_settings(output, settings, there)
    processes.wait()
    missing = {index for index in range(count) if not (output / files.file(index)).is_file()}
    processes.wait()
    if missing:
        loaded = load_pipeline(model, options.device, adapter=adapter, offload=options.offload)
        check_options(loaded, options)
    if missing and processes.main:
        _begin(output, {"schema": SCHEMA, "settings": settings, "device": options.device, "versions": versions()})
        if (output / METADATA_LINES).exists():
            # A killed run may have left half a line, on which nothing can follow.
            _write_metadata(output, files, options.seed)
    processes.wait()
    try:
        if missing:
            _sample_missing(loaded, files, missing, output, options, observer, processes)
        processes.wait()
    finally:
        if processes.main:
            _write_metadata(output, files, options.seed)
    if isinstance(files, Layout) and processes.main:
        files.finish(output, missing)
    return Generated(output, len(missing), count - len(missing))


def _sample_missing(
    loaded: Loaded,
    files: Files,
    missing: set[int],
    output: Path,
    options: GenerateOptions,
    observer: Observer,
    processes: Processes,
) -> None:
    """Sample a process's share of the missing images, every so-many-th batch."""
    count, size, device = options.count or 0, options.batch_size, options.device
    # A batch is sampled whole even where some of it is there: in another batch the rest would round otherwise.
    batches = [range(start, min(start + size, count)) for start in range(0, count, size)]
    work = [(batch, part) for batch in batches if (part := [index for index in batch if index in missing])]
    own = work[processes.index :: processes.count]
    with observer.stage(f"generate: images on {device}", sum(len(part) for _, part in own), "images") as advance:
        for batch, part in own:
            _sample(loaded, files, batch, part, output, options)
            advance(len(part))


def _check_folder(output: Path) -> None:
    if output.exists() and not output.is_dir():
        raise UsageError(f"{output}: is a file; the output is a folder")
    if not output.absolute().parent.is_dir():
        raise UsageError(f"{output.absolute().parent}: no such folder; make it first")
    # A run that was killed while it wrote its record leaves that half written.
    if output.is_dir() and not (output / RECORD).is_file() and not all(is_leftover(path) for path in output.iterdir()):
        raise UsageError(f"{output}: holds files but no {RECORD}; choose another output")


def _settings(
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


def _made_with(path: Path) -> dict[str, Any]:
    """The settings that the images in a folder were made with; empty where there are none yet."""
    if not path.is_file():
        return {}
    record = read_json(path)
    if record.get("schema") != SCHEMA or not isinstance(record.get("settings"), dict):
        raise UsageError(f"{path}: expected the schema {SCHEMA}, found {record.get('schema')!r}; choose another output")
    found: dict[str, Any] = record["settings"]
    return found


def _check_settings(output: Path, settings: dict[str, Any], there: dict[str, Any]) -> None:
    """Raise unless a folder has no images yet, or images of the same settings."""
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


def _begin(output: Path, record: dict[str, Any]) -> None:
    if not (output / RECORD).is_file():
        write_text(output / RECORD, json.dumps(record, indent=2) + "\n")


def _sample(
    loaded: Loaded, files: Files, batch: range, part: list[int], output: Path, options: GenerateOptions
) -> None:
    """Sample the images of a batch's numbers and write those of ``part``, each file whole."""
    texts = [files.text(index) for index in batch]
    images = sample(loaded, texts, options, seeds=[options.seed + index for index in batch])
    for index, image in zip(batch, to_uint8(images)):
        if index in part:
            _save(image, output / files.file(index))
    # A killed run leaves its images with their captions.
    with (output / METADATA_LINES).open("a", encoding="utf-8") as file:
        file.write("".join(_line(index, files, options.seed) for index in part))


def _save(image: Tensor, path: Path) -> None:
    from PIL import Image

    buffer = BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "PNG")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.write(buffer.getvalue())


def _write_metadata(output: Path, files: Files, seed: int) -> None:
    """The captions of all images in the folder, also of those that an interrupted run left without."""
    write_text(output / METADATA_LINES, "".join(_line(index, files, seed) for index in files.existing(output)))


def _line(index: int, files: Files, seed: int) -> str:
    entry = {"file_name": files.file(index), "text": files.text(index), "seed": seed + index}
    return json.dumps(entry, ensure_ascii=False) + "\n"
