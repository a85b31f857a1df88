"""A model folder in diffusers' format: found, checked, and described without building anything."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from liftkit.checkpoint.classes import check_classes
from liftkit.checkpoint.files import expanded, reason
from liftkit.checkpoint.misplaced import is_hub_id, misplaced, no_pipeline
from liftkit.checkpoint.text import check_unmarked
from liftkit.checkpoint.text import read_json as read_json
from liftkit.checkpoint.weights import STEM as STEM
from liftkit.checkpoint.weights import Weights, read_weights
from liftkit.embedded import MODELS
from liftkit.errors import UsageError

LONG_PROMPT = 512
"""Text tokens that a pipeline asks of its tokenizer by itself."""
DEFAULT_SIZE = 1024


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
        local = expanded(self.source).exists()
        return self.source if is_hub_id(self.source) and not local else self.path.resolve().name

    @property
    def home(self) -> Path:
        """Where links of its files may lead: the folder itself, and of the Hub's cache the model's own entry."""
        real = self.path.resolve()
        return real.parent.parent if real.parent.name == "snapshots" else real

    @property
    def components(self) -> list[str]:
        """The folders of what the pipeline is made of; optional parts that it goes without are left out."""
        return [name for name in self.index if self.class_of(name)]

    def class_of(self, component: str) -> str | None:
        """The class name of a component, or None where the pipeline has none."""
        entry = self.index.get(component)
        if component.startswith("_") or not isinstance(entry, list) or len(entry) != 2:
            return None
        return entry[1] if isinstance(entry[1], str) else None

    def config(self, component: str) -> dict[str, Any]:
        """A component's config, with the ``_class_name`` that the pipeline loads it as."""
        name = "scheduler_config.json" if component == "scheduler" else "config.json"
        config = read_json(self.path / component / name)
        return {**config, "_class_name": self.class_of(component)}

    def numbers(self, component: str) -> dict[str, Any]:
        """What a component's config says of its size and working, without what diffusers and a conversion add to it."""
        config = self.config(component)
        return {key: value for key, value in config.items() if not key.startswith(("_", "lift_"))}

    def weights(self, component: str) -> Weights:
        """The checked weight files of a diffusers component.

        Raises:
            UsageError: if they are missing, truncated, pickles or git-lfs pointers, or index and shards disagree.
        """
        return read_weights(self.path / component)

    def image_size(self) -> int:
        """The side in pixels that a pipeline, or else its VAE, was made for: ``sample_size``, one number or two; else 1024."""
        size = self.index.get("sample_size") or self.config("vae").get("sample_size")
        size = size[0] if isinstance(size, list) and size else size
        return size if isinstance(size, int) and size > 0 else DEFAULT_SIZE

    def text_length(self) -> int | None:
        """Text tokens to ask the pipeline for, where its only tokenizer knows fewer than the usual 512; else None."""
        path = self.path / "tokenizer" / "tokenizer_config.json"
        if not path.is_file() or any(name.startswith("tokenizer_") for name in self.components):
            return None
        limit = read_json(path).get("model_max_length")
        return limit if isinstance(limit, int) and 0 < limit < LONG_PROMPT else None


def find_model(
    model: str, check: Callable[[ModelFolder], object] = lambda folder: None, without: str | None = None
) -> ModelFolder:
    """A model folder from a path or a Hub id.

    Args:
        model: a diffusers folder, ``demo`` or ``tiny-flux2`` for the embedded ones (a folder of that name is ``./demo``), or
            ``organization/name`` on the Hub. The Hub's cache, offline mode and token
            are honored.
        check: called with a Hub model when its configs have come and its weights have not, so that a model that
            will not do fails before gigabytes are fetched.
        without: a component of which the Hub's weights are not needed.

    Raises:
        UsageError: if it is no diffusers pipeline, or the Hub does not give it.
    """
    # os.path leaves a ~ of nobody's as it is, where pathlib fails.
    path = MODELS.get(model) or expanded(model)
    if not path.exists() and is_hub_id(model):
        return _from_hub(model, check, without)
    if not path.is_dir():
        hint = "" if path.exists() else "; 'demo' is the embedded model"
        raise UsageError(f"{model}: {misplaced(model)}{hint}")
    return _open(path, model)


def _open(path: Path, source: str) -> ModelFolder:
    if not (path / "model_index.json").is_file():
        hint = no_pipeline(path, source)
        raise UsageError(f"{source}: no diffusers pipeline: model_index.json is missing{hint}")
    check_unmarked(path / "model_index.json")
    index = read_json(path / "model_index.json")
    strange = next((name for name in index if not re.fullmatch(r"[A-Za-z0-9_-]+", name)), None)
    if strange is not None:
        raise UsageError(f"{path / 'model_index.json'}: {strange!r} is no plain name of a component; refused")
    check_classes(index, path / "model_index.json")
    return ModelFolder(path, source, index)


def _from_hub(model: str, check: Callable[[ModelFolder], object], without: str | None) -> ModelFolder:
    """First the configs; then, of the components that the index lists, what diffusers and transformers load."""
    folder = _open(fetch(model, ["model_index.json", "*/config.json", "*/scheduler_config.json"]), model)
    check(folder)
    endings = ("json", "safetensors", "txt", "model", "jinja")
    wanted = {component: endings if component != without else ("json",) for component in folder.components}
    parts = [f"{component}/*.{ending}" for component in wanted for ending in wanted[component]]
    return _open(fetch(model, ["model_index.json", "README.md", "LICENSE*", *parts]), model)


def fetch(model: str, patterns: list[str]) -> Path:
    """The folder of a Hub model in the cache, with the files that match patterns.

    Raises:
        UsageError: if the Hub does not give it.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=patterns))
    except hub_errors() as error:
        raise UsageError(f"{model}: no such folder, and the Hub did not give it ({reason(error)})") from error


def hub_errors() -> tuple[type[Exception], ...]:
    """All that the Hub's client calls an error; its HTTPError is that of the HTTP library it is built on."""
    from huggingface_hub import errors

    named = (kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception))
    return (OSError, *named)
