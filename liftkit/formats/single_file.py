"""Single-file checkpoints in the original layout (BFL's ``flux-2-klein-base-4b.safetensors``, SD3.5) to diffusers folders.

diffusers' own mapping renames and splits the tensors, as its ``from_single_file`` does; their bytes go from file to file
without a model being built. Configs, VAE, text encoders and scheduler come from a diffusers folder of the same model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from liftkit.checkpoint.card import front_matter, plain_name, source_header
from liftkit.checkpoint.contents import no_transformer, quantization
from liftkit.checkpoint.files import reason, write_text
from liftkit.checkpoint.finite import check_files
from liftkit.checkpoint.folder import atomic_folder, check_space
from liftkit.checkpoint.header import Header, read_header, shown
from liftkit.checkpoint.model import STEM, ModelFolder, find_model
from liftkit.checkpoint.record import versions, write_record
from liftkit.checkpoint.rewrite import rewrite_file
from liftkit.checkpoint.source import PICKLES, list_files
from liftkit.checkpoint.text import printable
from liftkit.conversion.inputs import check_apart
from liftkit.conversion.write import FileCopier
from liftkit.errors import UsageError
from liftkit.formats.lora_names import seems_for
from liftkit.progress import Observer, Silent
from liftkit.tally import Tally

# What files of the original layout hold beside the transformer.
_OTHERS = (
    ("of a VAE", re.compile(r"(?:first_stage_model|vae)\.")),
    ("of a text encoder", re.compile(r"(?:text_encoders?(?:_\d)?|conditioner|cond_stage_model|clip_[lg]|t5xxl)\.")),
    ("an average of weights over the training", re.compile(r"(?:model_)?ema\.|model_ema_")),
    ("of a noise schedule", re.compile(r"(?:model\.)?(?:model_sampling|denoiser)\.")),
)
_INNER = ("model.diffusion_model.", "diffusion_model.", "transformer.", "model.")
_SHARD = re.compile(r"-\d{5}-of-(\d{5})$")


@dataclass
class ImportedCheckpoint:
    """A single file that became a folder.

    Args:
        output: the folder.
        transformer: its class.
        tally: of the file's tensors; those of a VAE or text encoders are left out, and come from the config's folder.
    """

    output: Path
    transformer: str
    tally: Tally


def import_checkpoint(
    path: Path,
    config: str,
    output: Path,
    *,
    shards: Literal["copy", "link"] = "copy",
    overwrite: bool = False,
    observer: Observer | None = None,
) -> ImportedCheckpoint:
    """Make a diffusers folder of a single file.

    Args:
        path: a .safetensors file, in the original layout or with diffusers' own names.
        config: a diffusers folder of the same model, or a Hub id: everything but the transformer's weights is its.
        output: the folder to make; it appears whole or not at all.
        shards: whether the other components' weights are copied, or linked.
        overwrite: replace an earlier folder of ours.
        observer: shows the progress.

    Raises:
        UsageError: if the file is no checkpoint of that model; nothing was written.
        LiftkitError: if the disk refuses.
    """
    observer = observer or Silent()
    header, folder = read_header(path), find_model(config, without="transformer")
    check_apart(output, {"the file": path, "--config": folder.path})
    name = folder.class_of("transformer") or "no transformer"
    shapes = _expected(folder, name)
    tensors, tally = _mapped(path, header, name, folder, shapes)
    files = {part: _other_files(folder, part) for part in folder.components if part != "transformer"}
    size = sum(tensor.nbytes for tensor in tensors.values())
    used = replace(header, tensors={key: header.tensors[key] for key in own_tensors(header)[0].values()})
    others = [file for group in files.values() for file in group if file.suffix == ".safetensors"]
    check_files([used, *map(read_header, others)], budget=math.inf)
    with atomic_folder(output, overwrite=overwrite) as building:
        check_space(output, size + sum(file.stat().st_size for group in files.values() for file in group))
        copier = FileCopier(link=shards == "link", note=observer.note)
        for group in files.values():
            for file in group:
                target = building / file.relative_to(folder.path)
                target.parent.mkdir(parents=True, exist_ok=True)
                copier.copy(file, target)
        for file in (folder.path / "model_index.json", *sorted(folder.path.glob("LICENSE*"))):
            copier.copy(file, building / file.name)
        (building / "transformer").mkdir()
        copier.copy(folder.path / "transformer" / "config.json", building / "transformer" / "config.json")
        target = building / "transformer" / f"{STEM}.safetensors"
        with observer.stage("write: transformer", size, "bytes") as advance:
            rewrite_file(replace(header, tensors={}, metadata={}), target, tensors, progress=advance)
        _describe(building, path, folder)
    return ImportedCheckpoint(output, name, tally)


def _other_files(folder: ModelFolder, part: str) -> list[Path]:
    """A component's files; pickles stay behind."""
    return [path for path in list_files(folder.path / part, folder.home) if path.suffix not in PICKLES]


def _expected(folder: ModelFolder, name: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the transformer's tensors, by its config; without memory."""
    import diffusers
    from accelerate import init_empty_weights

    from liftkit.models.registry import architecture, is_lifted

    architecture(name)
    if is_lifted(name):
        raise UsageError(f"--config {folder.source}: a pixel model ({name}); give the latent one that the file is of")
    config = folder.config("transformer")
    try:
        with init_empty_weights(include_buffers=False):
            model = getattr(diffusers, name).from_config(config)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UsageError(
            f"{folder.path / 'transformer' / 'config.json'}: {name} cannot be made ({reason(error)})"
        ) from error
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


def _mapped(
    path: Path, header: Header, name: str, folder: ModelFolder, shapes: dict[str, tuple[int, ...]]
) -> tuple[dict[str, Tensor], Tally]:
    """The file's tensors under diffusers' names, as views of the file where nothing is computed; and what became of all."""
    own, tally = own_tensors(header)
    views = _views(path)
    tensors = {inner: views[key] for inner, key in own.items()}
    numbers = sum(tensor.numel() for tensor in tensors.values())
    if len(tensors.keys() & shapes.keys()) <= min(len(tensors), len(shapes)) / 2:
        tensors = _translated(path, tensors, name, folder.config("transformer"))
    for what, keys in (("missing", shapes.keys() - tensors.keys()), ("unknown", tensors.keys() - shapes.keys())):
        if keys:
            raise UsageError(
                f"{path}: for {name} as {folder.source} has it, {len(keys)} tensors are {what}, such as "
                f"{shown(min(keys))}{_part_of_several(path) or _looks_like(own)}"
            )
    for key, shape in shapes.items():
        if tuple(tensors[key].shape) != shape:
            raise UsageError(
                f"{path}: tensor {key!r} is {tuple(tensors[key].shape)}, by the config of {folder.source} {shape}; is it the "
                "config of this model?"
            )
        if not tensors[key].is_floating_point():
            raise UsageError(
                f"{path}: tensor {key!r} is of dtype {tensors[key].dtype}, no weights; fetch the file again"
            )
    if sum(tensor.numel() for tensor in tensors.values()) != numbers:
        raise UsageError(
            f"{path}: diffusers' mapping to {name} leaves out some of its {numbers} numbers; use a diffusers folder"
        )
    tally.use(len(own))
    return {key: tensors[key] for key in shapes}, tally


def own_tensors(header: Header) -> tuple[dict[str, str], Tally]:
    """The transformer's tensors in a file, by name without prefix; all others are left out and counted.

    Raises:
        UsageError: if it has none, one twice, or they are quantized.
    """
    path, own, tally = header.path, dict[str, str](), Tally("tensors")
    for key in header.tensors:
        other = next((what for what, pattern in _OTHERS if pattern.match(key)), None)
        if other is not None:
            tally.leave_out(printable(key[:160]), other)
        elif _inner(key) in own:
            raise UsageError(
                f"{path}: tensors {shown(own[_inner(key)])} and {shown(key)} are the same one; keep one of them"
            )
        else:
            own[_inner(key)] = key
    other = no_transformer(header.tensors)
    if other:
        raise UsageError(f"{path}: {other}")
    if not own:
        raise UsageError(f"{path}: no transformer in this file: {tally.reasons() or 'it is empty'}")
    found = quantization({key: header.tensors[key] for key in own.values()})
    if found is not None:
        raise UsageError(
            f"{path}: quantized: {found}; its numbers are no longer the model's own, give the file in full or half precision"
        )
    return own, tally


def _part_of_several(path: Path) -> str:
    """What to do with a file whose name says that it is one of several."""
    match = _SHARD.search(path.stem)
    return f"; it is one of {int(match[1])} files: give the whole folder to liftkit convert" if match else ""


def _looks_like(names: Iterable[str]) -> str:
    model = seems_for(names)
    return f"; the file looks like one of {model}, is --config that of the same model?" if model else ""


def _views(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, mapped and not read."""
    from safetensors.torch import load_file

    return load_file(path)


def _inner(key: str) -> str:
    for prefix in _INNER:
        if key.startswith(prefix):
            return key.removeprefix(prefix)
    return key


def _translated(path: Path, tensors: dict[str, Tensor], name: str, config: dict[str, Any]) -> dict[str, Tensor]:
    """diffusers' own mapping of the original layout."""
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    if name not in SINGLE_FILE_LOADABLE_CLASSES:
        raise UsageError(f"{path}: diffusers knows no original layout of {name}; use a diffusers folder")
    mapping, given = SINGLE_FILE_LOADABLE_CLASSES[name]["checkpoint_mapping_fn"], dict(tensors)
    with _plain_errors(path, name, _looks_like(tensors)):
        # It takes out of what is given whatever it understands.
        return {**mapping(checkpoint=given, config=config), **given}


@contextmanager
def _plain_errors(path: Path, name: str, hint: str) -> Iterator[None]:
    try:
        yield
    except (LookupError, ValueError, RuntimeError, AttributeError, TypeError, ArithmeticError, AssertionError) as error:
        raise UsageError(
            f"{path}: not in the original layout of {name} as diffusers knows it ({type(error).__name__}: "
            f"{reason(error)[:200]}){hint or '; is --config that of the same model?'}"
        ) from error


def _describe(building: Path, path: Path, folder: ModelFolder) -> None:
    """The card, with the license that the config's folder states, and the record."""
    card = f"""{front_matter(source_header(folder.path / "README.md"))}
# {plain_name(path.stem)}

The transformer of `{plain_name(path.name)}` in diffusers' format; all else is of
`{plain_name(folder.name)}`, whose license and terms apply.
"""
    write_text(building / "README.md", card)
    record = {
        "format": "liftkit.import",
        "version": 1,
        "source": {"file": path.name, "config": folder.name},
        "versions": versions(),
    }
    write_record(building, record)
