"""A model folder with an adapter merged into its transformer, tensor by tensor."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

from torch import Tensor

from liftkit.checkpoint.components import Component, read_components
from liftkit.checkpoint.files import write_text
from liftkit.checkpoint.folder import RECORD, copy_tree
from liftkit.checkpoint.model import ModelFolder, Weights, read_json
from liftkit.checkpoint.rewrite import rewrite_file
from liftkit.checkpoint.weights import read_known
from liftkit.formats.generations import MERGED, history_of
from liftkit.lift import Lift
from liftkit.models.adapted import check_same_lift
from liftkit.models.adapter import LIFT, Adapter
from liftkit.models.detail_head import KEY
from liftkit.models.surgery import BASIS
from liftkit.progress import Observer


def write_merged(
    adapter: Adapter, folder: ModelFolder, building: Path, observer: Observer, *, move: bool = False
) -> None:
    """Write a model with an adapter merged into its transformer; all other files, and tensors, as they are, but for the names
    of variants, for which nobody will ask.

    Args:
        adapter: to merge.
        folder: the model, of the class that the adapter applies to.
        building: where its files go, except its record and card.
        observer: shows the progress.
        move: rename the other files instead of copying them: the folder is on the same disk and will go.

    Raises:
        UsageError: if adapter and model do not belong together.
    """
    bring: Callable[[Path, Path], object] = os.replace if move else copy_tree
    weights = folder.weights("transformer")
    adapter.check(tensor_shapes(weights))
    if adapter.lift is not None:
        there = Lift.load(folder.path / LIFT)
        check_same_lift(adapter.lift, adapter.lift.basis.to(there.basis), there.basis, there.scale)
    parts = {part.name: part for part in read_components(folder)}
    variants = {name for name, part in parts.items() if part.weights is not None and part.weights.variant is not None}
    for path in sorted(folder.path.iterdir()):
        if path.name in variants - {"transformer"}:
            _bring_component(parts[path.name], building / path.name, bring)
        elif path.name not in ("transformer", RECORD, "README.md", MERGED):
            bring(path, building / path.name)
    target, names = building / "transformer", weights.plain_names()
    _bring_component(parts["transformer"], target, bring, without=names.values())
    history = history_of(folder)
    # Where every weight learned, there is no smaller account of what was learned than the weights themselves.
    if history is not None and not set(adapter.full) >= set(weights.where) - {BASIS}:
        history.then(adapter).save(building)
    added = adapter.added(weights.where)
    if added:
        _register_head(adapter, target, added, next(iter(names.values())))
    total = sum(header.path.stat().st_size for header in weights.headers.values())
    with observer.stage("write: transformer", total, "bytes") as advance:
        for number, (name, header) in enumerate(weights.headers.items()):
            here = [key for key in adapter.shapes if weights.where.get(key) == name]
            here += list(added) if number == 0 else []
            rewrite_file(header, target / names[name], _Changes(adapter, weights, here), progress=advance)


def _register_head(adapter: Adapter, target: Path, added: Mapping[str, Tensor], file: str) -> None:
    """Let config and index of a transformer's folder know the detail head that its weights get, in one of its files."""
    place = target / "config.json"
    write_text(place, json.dumps({**read_json(place), KEY: adapter.head}, indent=2) + "\n")
    for index in target.glob("*.safetensors.index.json"):
        content = read_json(index)
        content["weight_map"] |= dict.fromkeys(added, file)
        size = sum(4 * tensor.numel() for tensor in added.values())
        if isinstance(content.get("metadata"), dict) and "total_size" in content["metadata"]:
            content["metadata"]["total_size"] += size
        write_text(index, json.dumps(content, indent=2) + "\n")


def _bring_component(
    part: Component, target: Path, bring: Callable[[Path, Path], object], without: Collection[str] = ()
) -> None:
    """The files of a component under their plain names, but for some."""
    target.mkdir()
    for name, path in part.files.items():
        if name not in without:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            bring(path, target / name)
    for name, text in part.index.items():
        write_text(target / name, text)


def tensor_shapes(weights: Weights) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in weight files, by name."""
    return {name: entry.shape for header in weights.headers.values() for name, entry in header.tensors.items()}


class _Changes(Mapping[str, Tensor]):
    """Tensors with what was learned, each computed when it is asked for: together they may be gigabytes."""

    def __init__(self, adapter: Adapter, weights: Weights, names: list[str]) -> None:
        self.adapter, self.weights, self.names = adapter, weights, names
        self._last: tuple[str, Tensor] | None = None

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        if self._last is None or self._last[0] != name:
            known = name in self.weights.where
            own = (
                self.adapter.apply_to(name, read_known(self.weights, name))
                if known
                else self.adapter.full[name].float()
            )
            self._last = name, own
        return self._last[1]

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)
