"""A model folder in diffusers' format: found, checked, and described without building anything."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from liftkit.checkpoint.header import Header, read_header
from liftkit.errors import UsageError

STEM = "diffusion_pytorch_model"


@dataclass(frozen=True)
class Weights:
    """The weight files of one component.

    Args:
        headers: one per shard, by file name, in order.
        where: the shard of each tensor.
    """

    headers: dict[str, Header]
    where: dict[str, str]

    @property
    def sharded(self) -> bool:
        """Whether there is an index."""
        return len(self.headers) > 1

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.size for header in self.headers.values() for entry in header.tensors.values())


@dataclass(frozen=True)
class ModelFolder:
    """A diffusers pipeline on disk.

    Args:
        path: the folder.
        source: what the user called it.
        index: model_index.json.
    """

    path: Path
    source: str
    index: dict[str, Any]

    @property
    def name(self) -> str:
        """What to call it: the Hub id, or the folder's name without its path."""
        return self.source if not Path(self.source).exists() else self.path.resolve().name

    def class_of(self, component: str) -> str | None:
        """The class name of a component, or None where the pipeline has none."""
        entry = self.index.get(component)
        return entry[1] if isinstance(entry, list) and len(entry) == 2 else None

    def config(self, component: str) -> dict[str, Any]:
        """A component's config, with the ``_class_name`` that the pipeline loads it as."""
        name = "scheduler_config.json" if component == "scheduler" else "config.json"
        config = read_json(self.path / component / name)
        return {**config, "_class_name": self.class_of(component)}

    def weights(self, component: str) -> Weights:
        """The checked weight files of a diffusers component.

        Raises:
            UsageError: if they are missing, truncated, pickles or git-lfs pointers, or index and shards disagree.
        """
        return read_weights(self.path / component)


def find_model(model: str, *, download: bool = True) -> ModelFolder:
    """A model folder from a path or a Hub id.

    Args:
        model: a diffusers folder, or ``organisation/name`` on the Hub. The Hub's cache, offline mode and token
            are honoured.
        download: False refuses anything that is not a local folder.

    Raises:
        UsageError: if it is no diffusers pipeline.
    """
    path = Path(model).expanduser()
    if not path.exists() and download and _is_hub_id(model):
        path = _from_hub(model)
    if path.is_file():
        raise UsageError(f"{model}: a single file; liftkit reads diffusers folders (with model_index.json)")
    if not path.is_dir():
        raise UsageError(f"{model}: no such folder, and no Hub id of the form organisation/name")
    if not (path / "model_index.json").is_file():
        inner = [p.parent.name for p in sorted(path.glob("*/model_index.json"))]
        hint = f"; did you mean {path / inner[0]}?" if inner else ""
        raise UsageError(f"{model}: no diffusers pipeline: model_index.json is missing{hint}")
    return ModelFolder(path, model, read_json(path / "model_index.json"))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        UsageError: if it is missing or no object.
    """
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); is the model folder complete?") from error
    except ValueError as error:
        raise UsageError(f"{path}: no valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def read_weights(folder: Path) -> Weights:
    """See :meth:`ModelFolder.weights`."""
    indexes = sorted(folder.glob(f"{STEM}.safetensors.index*.json"))
    single = folder / f"{STEM}.safetensors"
    if indexes:
        return _read_sharded(folder, indexes[0])
    if not single.exists():
        variants = sorted(folder.glob(f"{STEM}.*.safetensors"))
        if len(variants) != 1:
            raise UsageError(_no_weights(folder, [path.name for path in variants]))
        single = variants[0]
    header = read_header(single)
    return Weights({single.name: header}, dict.fromkeys(header.tensors, single.name))


def _read_sharded(folder: Path, index: Path) -> Weights:
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise UsageError(f"{index}: it has no weight_map; fetch the file again")
    names = sorted(set(map(str, where.values())))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors") or "\\" in name or not name.isprintable():
            raise UsageError(f"{index}: {name!r} is no plain name of a .safetensors file; refused")
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
    return Weights(headers, found)


def _no_weights(folder: Path, variants: list[str]) -> str:
    if variants:
        return f"{folder}: several weight files ({', '.join(variants)}); keep one variant in the folder"
    pickles = [path.name for ending in ("bin", "pt", "ckpt", "pth") for path in sorted(folder.glob(f"*.{ending}"))]
    if pickles:
        return f"{folder}: only pickled weights ({pickles[0]}), which liftkit never opens; save as safetensors first"
    return f"{folder}: {STEM}.safetensors is missing; is the model folder complete?"


def _is_hub_id(model: str) -> bool:
    return model.count("/") == 1 and not model.startswith((".", "/", "~")) and "\\" not in model


def _from_hub(model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "README.md", "LICENSE*"]
    try:
        return Path(snapshot_download(model, allow_patterns=patterns, ignore_patterns=["*.bin"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(f"{model}: no such folder, and the Hub did not give it ({reason})") from error
