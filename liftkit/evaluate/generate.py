"""Self-generated training data: a model's own samples as a dataset folder of images and captions.

Image i depends on the model, the settings, its prompt and its seed alone, so that an interrupted folder is gone on with
and a finished one can be made larger.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path

from torch import Tensor

from liftkit.checkpoint.files import atomic_file, write_text
from liftkit.checkpoint.leftovers import sweep_inside
from liftkit.checkpoint.lock import claim
from liftkit.checkpoint.model import ModelFolder
from liftkit.checkpoint.record import versions
from liftkit.color import to_uint8
from liftkit.data.metadata import METADATA_LINES
from liftkit.evaluate.generated import RECORD, SCHEMA, begin, check_folder, check_settings, made_with, settings_of
from liftkit.evaluate.layouts import Files, Layout, Numbered
from liftkit.fit.distributed import Processes
from liftkit.models.adapter import Adapter
from liftkit.models.loaded import Loaded, load_pipeline
from liftkit.models.sampling import check_options, sample
from liftkit.options import GenerateOptions
from liftkit.progress import Observer, Silent


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
        check_folder(output)
    with claim(output, inside=True) if processes.main else nullcontext():
        if processes.main:
            sweep_inside(output)
        return _generate(model, files, output, options, observer or Silent(), adapter, processes)


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
        there = made_with(output / RECORD)
        settings = settings_of(model, files, options, observer, adapter, there)
        check_settings(output, settings, there)
    processes.wait()
    missing = {index for index in range(count) if not (output / files.file(index)).is_file()}
    processes.wait()
    if missing:
        loaded = load_pipeline(model, options.device, adapter=adapter, offload=options.offload)
        check_options(loaded, options)
    if missing and processes.main:
        begin(output, {"schema": SCHEMA, "settings": settings, "device": options.device, "versions": versions()})
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
