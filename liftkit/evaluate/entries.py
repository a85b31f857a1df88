"""The models of a comparison, found and checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from liftkit.checkpoint.folder import manifest
from liftkit.checkpoint.model import ModelFolder, find_model
from liftkit.errors import UsageError
from liftkit.evaluate.cache import digest
from liftkit.lift import Lift
from liftkit.models.adapter import Adapter, is_adapter
from liftkit.models.loaded import Loaded, load_pipeline
from liftkit.models.registry import architecture, is_lifted


@dataclass(frozen=True)
class Entry:
    """A model to be compared.

    Args:
        source: what the user called it.
        name: what to call it in a table.
        folder: of its pipeline; an adapter's is that of its base.
        lift: of a pixel model; None for a latent one.
        load: its stock pipeline, on a device.
        files: finds the digest of all files that its samples follow from.
    """

    source: str
    name: str
    folder: ModelFolder
    lift: Lift | None
    load: Callable[[str], Loaded]
    files: Callable[[], str]

    @property
    def size(self) -> int:
        """Side of the images that it was made for."""
        return self.folder.image_size()

    @cached_property
    def digest(self) -> str:
        """Of all files that its samples follow from; they are read when it is first asked for."""
        return self.files()


def open_entry(name: str, base: str = "demo") -> Entry:
    """The one place where a name on the command line becomes a model.

    Args:
        name: a latent or converted pipeline folder, a Hub id, ``demo`` for the embedded latent model, or the folder of an adapter.
        base: the model that an adapter applies to.

    Raises:
        UsageError: if it is none of these, or its architecture is not supported.
    """
    if is_adapter(name):
        return _adapted(name, base)
    folder = find_model(name)
    kind = folder.class_of("transformer")
    if kind is None:
        raise UsageError(f"{name}: the pipeline has no transformer; give a latent or a converted flow model")
    architecture(kind)
    lift = Lift.load(folder.path / "lift.safetensors") if is_lifted(kind) else None
    return Entry(
        source=name,
        name=_name(folder.path, folder.name),
        folder=folder,
        # A subspace of latents is no way from latents to pixels.
        lift=lift if lift is not None and lift.space == "pixel" else None,
        load=lambda device: load_pipeline(folder, device),
        files=lambda: _digest(folder),
    )


def _adapted(name: str, base: str) -> Entry:
    """An adapter upon its base."""
    below, adapter = open_entry(base), Adapter.load(name)
    return Entry(
        source=name,
        name=_name(Path(name), Path(name).resolve().name),
        folder=below.folder,
        lift=adapter.lift,
        load=lambda device: load_pipeline(below.folder, device, adapter=adapter),
        files=lambda: digest({"base": below.digest, "adapter": manifest(Path(name))}),
    )


def _name(path: Path, name: str) -> str:
    """What to call a model in a table: the result of a run is called as the run is, ``photos`` for ``runs/photos/model``."""
    above = path.resolve().parent
    return above.name if path.resolve().name in ("model", "adapter") and (above / "run.json").is_file() else name


def open_pixel(name: str, base: str = "demo") -> tuple[Entry, Lift]:
    """A pixel model and its lift; ``base`` as for :func:`open_entry`.

    Raises:
        UsageError: if it is another model.
    """
    entry = open_entry(name, base)
    if entry.lift is None:
        raise UsageError(
            f"{name}: a latent model; only the first is the latent base, make the others by liftkit convert"
        )
    return entry, entry.lift


def open_latent(name: str, flag: str = "", base: str = "demo") -> Entry:
    """A latent model; ``base`` as for :func:`open_entry`.

    Raises:
        UsageError: if it is a pixel model.
    """
    entry = open_entry(name, base)
    if entry.lift is not None:
        raise UsageError(f"{flag + ' ' if flag else ''}{name}: a pixel model; a latent pipeline is expected here")
    return entry


def labels(entries: Sequence[Entry], given: Sequence[str]) -> list[str]:
    """What to call the entries: the labels that were given, else their names, numbered where two are alike.

    Raises:
        UsageError: if there are labels, and not one for each.
    """
    if given and len(given) != len(entries):
        raise UsageError(f"--label: {len(given)} given for {len(entries)} pixel models; give one for each, in order")
    names = list(given) or [entry.name for entry in entries]
    return [
        f"{name} ({names[: index + 1].count(name)})" if names.count(name) > 1 else name
        for index, name in enumerate(names)
    ]


def _digest(folder: ModelFolder) -> str:
    """Of the components' files: what stands beside them, such as a model card, changes no sample."""
    return digest({"index": folder.index, **{name: manifest(folder.path / name) for name in folder.components}})
