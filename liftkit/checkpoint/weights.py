"""The weight files of one component of a pipeline: which they are, and whether they are whole."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from liftkit.checkpoint.contents import quantization
from liftkit.checkpoint.header import Header, read_header
from liftkit.checkpoint.rewrite import read_tensor
from liftkit.checkpoint.source import PICKLES
from liftkit.checkpoint.text import read_json
from liftkit.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

STEM = "diffusion_pytorch_model"
Library = Literal["diffusers", "transformers"]
STEMS: dict[Library, str] = {"diffusers": STEM, "transformers": "model"}
"""How the weight files of a library's models are called."""


@dataclass(frozen=True)
class Weights:
    """The weight files of one component.

    Args:
        headers: one per shard, by file name, in order.
        where: the shard of each tensor.
        sharded: whether there is an index, were it of one shard.
        variant: of the files' names, such as ``fp16``; what the libraries need to find them.
        index: the name of the index; empty where there is none.
    """

    headers: dict[str, Header]
    where: dict[str, str]
    sharded: bool = False
    variant: str | None = None
    index: str = ""

    def read(self, name: str) -> Tensor | None:
        """One tensor, read alone, in its own dtype; None where there is none of that name."""
        return read_tensor(self.headers[self.where[name]], name) if name in self.where else None

    def plain_names(self) -> dict[str, str]:
        """New names of the weight files, by their old ones: without the variant of ``model.fp16-00001-of-00002.safetensors``,
        for which nobody will ask; as they are where two would get the same name."""
        if self.variant is None:
            return {name: name for name in self.headers}
        tag = re.compile(rf"\.{re.escape(self.variant)}(?=[.-])")
        names = {name: tag.sub("", name) for name in self.headers}
        return names if len(set(names.values())) == len(names) else {name: name for name in names}


def read_weights(folder: Path, library: Library = "diffusers", *, quantized: bool = False) -> Weights:
    """The checked weight files of a component: the plain ones, or the only variant where there are none.

    Args:
        folder: of the component.
        library: whose model it is, which decides how the files are called.
        quantized: whether they may be quantized, as a config says that a library reads.

    Raises:
        UsageError: if they are missing, truncated, pickles, git-lfs pointers or quantized, or index and shards disagree.
    """
    weights = _read_weights(folder, library)
    for header in weights.headers.values():
        found = None if quantized else quantization(header.tensors)
        if found is not None:
            raise UsageError(f"{header.path}: quantized: {found}; liftkit needs the full-precision weights")
    return weights


def _read_weights(folder: Path, library: Library) -> Weights:
    files = _weight_files(folder, library)
    variant = None if None in files or len(files) != 1 else next(iter(files))
    if variant not in files:
        raise UsageError(_no_weights(folder, STEMS[library], [path.name for path in files.values()]))
    path = files[variant]
    if path.suffix == ".json":
        return _read_sharded(folder, path, variant)
    header = read_header(path)
    return Weights({path.name: header}, dict.fromkeys(header.tensors, path.name), variant=variant)


def _weight_files(folder: Path, library: Library) -> dict[str | None, Path]:
    """The index or the single file of every variant, whichever the library reads; that of the plain weights under None."""
    stem = re.escape(STEMS[library])
    index = re.compile(rf"{stem}\.safetensors\.index(?:\.(?P<variant>[^.]+))?\.json")
    # A shard's own name is neither.
    single = re.compile(rf"{stem}(?:\.(?P<variant>(?![^.]*-\d+-of-\d+\.)[^.]+))?\.safetensors")
    names = sorted(path.name for path in folder.glob(f"{STEMS[library]}*"))
    found: dict[str | None, Path] = {}
    for pattern in (index, single) if library == "diffusers" else (single, index):
        for match in filter(None, map(pattern.fullmatch, names)):
            found.setdefault(match["variant"], folder / match[0])
    return found


def _read_sharded(folder: Path, index: Path, variant: str | None) -> Weights:
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise UsageError(f"{index}: it has no weight_map; fetch the file again")
    names = sorted(set(map(str, where.values())))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors") or "\\" in name or not name.isprintable():
            raise UsageError(f"{index}: {name!r} is no plain name of a .safetensors file; refused")
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise UsageError(
            f"{folder / missing[0]}: missing, {len(missing)} of the {len(names)} shards that {index.name} lists; "
            "fetch the model again"
        )
    headers = {name: read_header(folder / name) for name in names}
    found = {key: name for name, header in headers.items() for key in header.tensors}
    if sum(len(header.tensors) for header in headers.values()) != len(found):
        raise UsageError(f"{index}: a tensor stands in two shards; fetch the model again")
    wrong = sorted(key for key in found.keys() | where.keys() if found.get(key) != where.get(key))
    if wrong:
        key = wrong[0]
        raise UsageError(
            f"{index}: tensor {key!r} should be in {where.get(key, 'no shard')}, it is in {found.get(key, 'none')}"
        )
    return Weights(headers, found, sharded=True, variant=variant, index=index.name)


def _no_weights(folder: Path, stem: str, variants: list[str]) -> str:
    if variants:
        return f"{folder}: several variants of the weights ({', '.join(variants)}); keep one in the folder"
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    pickles = [name for name in names if name.endswith(PICKLES)]
    if pickles:
        return (
            f"{folder / pickles[0]}: a pickle, which liftkit never opens; save the model with safe_serialization=True"
        )
    shards = [name for name in names if name.endswith(".safetensors")]
    if shards:
        alone = len(shards) == 1 and not re.search(r"-\d+-of-\d+\.", shards[0])
        what = f"rename it to {stem}.safetensors if it is that" if alone else "fetch the model again"
        return f"{folder}: neither {stem}.safetensors nor an index {stem}.safetensors.index.json beside {shards[0]}; {what}"
    others = [
        name for name in names if name.endswith((".gguf", ".msgpack", ".h5", ".onnx", ".incomplete", ".part", ".aria2"))
    ]
    found = f"; {others[0]} is unfinished or of another format" if others else ""
    return f"{folder}: {stem}.safetensors is missing{found}; is the model folder complete?"


def read_known(weights: Weights, name: str) -> Tensor:
    """A tensor that is there."""
    tensor = weights.read(name)
    assert tensor is not None
    return tensor
