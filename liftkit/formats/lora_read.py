"""LoRA files of every trainer, read into one form: diffusers' keys, the strength in B, every key of the file accounted for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from liftkit.checkpoint.contents import ALPHA, DIFF_B, FOLDED, MAGNITUDE, Part, cannot_fold, part_of
from liftkit.checkpoint.files import read_safetensors
from liftkit.checkpoint.header import shown
from liftkit.checkpoint.model import ModelFolder
from liftkit.checkpoint.text import printable
from liftkit.errors import UsageError
from liftkit.formats.kinds import lora_file
from liftkit.formats.lora_fold import Change, folded
from liftkit.formats.lora_names import ModuleNames, Place, of_embedding, of_text, seems_for
from liftkit.formats.lora_splits import joined
from liftkit.formats.lora_strength import (
    CONFIG,
    METADATA,
    WEIGHTS,
    Strength,
    folder_strength,
    metadata_strength,
)
from liftkit.formats.merging import tensor_shapes
from liftkit.models.spec import Architecture
from liftkit.tally import Tally

_PEFT = "base_model.model."
_LARGE = 2 * 1000**3
"""Bytes that a LoRA may take without being compared with its model."""


@dataclass(frozen=True)
class Lora:
    """A LoRA in diffusers' keys.

    Args:
        path: the file that it was read from.
        state: ``transformer.<module>.lora_A.weight`` and so on; of text encoders likewise.
        modules: of the transformer.
        metadata: of the file to write.
        kinds: of change that the file was made of.
        tally: of the file's keys.
        notes: what else its owner should know.
    """

    path: Path
    state: dict[str, Tensor]
    modules: set[str]
    metadata: dict[str, str]
    kinds: list[str]
    tally: Tally
    notes: list[str]


def read_lora(path: Path, spec: Architecture, shapes: Mapping[str, tuple[int, ...]], folder: ModelFolder) -> Lora:
    """Read a LoRA of a latent model.

    Args:
        path: a file, or a folder of peft's or diffusers' with one.
        spec: the architecture.
        shapes: of the latent transformer's tensors, by name.
        folder: the model, for the components that its pipeline loads LoRAs into.

    Raises:
        UsageError: naming the key that has no place, is not complete or fits no module, if there is one; or if nothing is left.
    """
    file = lora_file(path)
    if file is None:
        raise UsageError(f"{path}: no LoRA file in this folder; give the .safetensors file itself")
    tensors, metadata = read_safetensors(file)
    try:
        whole = joined(tensors)
        reader = _Reader(file, whole, metadata, ModuleNames(spec, shapes), folder)
        reader.tally.use(len(tensors) - len(whole))
        return reader.read()
    except UsageError as error:
        raise error if str(error).startswith(str(file.parent)) else UsageError(f"{file}: {error}") from error


class _Reader:
    """One file on its way."""

    def __init__(
        self, path: Path, tensors: dict[str, Tensor], metadata: dict[str, str], names: ModuleNames, folder: ModelFolder
    ) -> None:
        self.path, self.tensors, self.metadata, self.names = path, tensors, metadata, names
        self.tally, self.notes = Tally("keys"), list[str]()
        self.text = _loadable_text(folder)
        weights = folder.weights("transformer")
        self.pixels = {
            name.removesuffix(".weight"): (shape[0], prod(shape[1:]))
            for name, shape in tensor_shapes(weights).items()
            if name.endswith(".weight") and len(shape) > 1
        }
        self.limit = max(_LARGE, sum(header.path.stat().st_size for header in weights.headers.values()))
        self.size, self.state = 0, dict[str, Tensor]()
        self.modules: dict[str, str] = {}

    def read(self) -> Lora:
        groups = self._grouped()
        homes = {stem: self.names.find(stem) for stem in groups}
        self._check_homes(groups, homes)
        stated = metadata_strength(self.path, self.metadata)
        stays = "transformer" in stated and all(strength.loads for strength in stated.values())
        stays = stays and all(map(self._as_diffusers_writes, groups, groups.values()))
        self.config = self._config()
        for stem, parts in groups.items():
            change = folded(
                stem, {part.name: self.tensors[key] for key, part in parts}, self._strength(stem, stated, stays)
            )
            places = homes[stem]
            if any(part.name == DIFF_B for _, part in parts):
                self._check_bias(stem, places or ())
            if places is None:
                self._put(stem, change, None)
            else:
                for place, change_there in self._split(stem, change, places):
                    self._claim(place.module, stem)
                    self._put(f"transformer.{place.module}", change_there, place.module)
            self.tally.use(len(parts))
        self._complete()
        metadata = {key: value for key, value in self.metadata.items() if key != METADATA or stays}
        kinds = sorted({part.kind for parts in groups.values() for _, part in parts} - {"alpha"})
        return Lora(self.path, self.state, set(self.modules), metadata, kinds, self.tally, self.notes)

    def _grouped(self) -> dict[str, list[tuple[str, Part]]]:
        """Keys by module; those that no LoRA file can hold are refused, those of other things left out."""
        groups: dict[str, list[tuple[str, Part]]] = {}
        seen: dict[tuple[str, str], str] = {}
        for key in self.tensors:
            part = part_of(key)
            if of_embedding(key):
                self._leave_out(key, "of a textual inversion, which is no LoRA")
            elif of_text(key) and not key.startswith(self.text):
                self._leave_out(
                    key,
                    "of a text encoder, which liftkit carries over in diffusers' names only, for pipelines that load it",
                )
            elif part is None or part.kind not in FOLDED:
                raise UsageError(self._refusal(key, part))
            elif (part.stem, part.name) in seen:
                raise UsageError(
                    f"tensors {shown(seen[part.stem, part.name])} and {shown(key)} are the same part twice"
                )
            else:
                seen[part.stem, part.name] = key
                groups.setdefault(part.stem, []).append((key, part))
        return groups

    def _refusal(self, key: str, part: Part | None) -> str:
        if part is not None:
            return cannot_fold(part.kind, key)
        what = "whole weights (modules_to_save)" if key.endswith((".weight", ".bias")) else "no part of a LoRA"
        return (
            f"tensor {shown(key)}: {what}, which a LoRA file cannot hold; every key has to have a place in the result"
        )

    def _check_homes(
        self, groups: Mapping[str, list[tuple[str, Part]]], homes: Mapping[str, tuple[Place, ...] | None]
    ) -> None:
        """Raise unless every module is one of the transformer or of a text encoder, and there is one of the transformer."""
        lost = [stem for stem, places in homes.items() if places is None and not stem.startswith(self.text)]
        if lost:
            model = seems_for(lost)
            count = f"{len(lost)} of {len(groups)} modules are not in this transformer, such as {shown(lost[0])}"
            more = f"; left out besides: {self.tally.reasons()}" if self.tally.lost else ""
            raise UsageError(
                f"{count}; {f'it looks like a LoRA of {model}' if model else 'is it the right base?'}{more}"
            )
        if not any(homes.values()):
            left = self.tally.reasons() or f"{len(groups)} modules of text encoders, which need no lifting"
            raise UsageError(f"nothing here is for the transformer: {left}")

    def _config(self) -> Strength | None:
        """That of the config beside the file, if it is this file's."""
        beside = self.path.parent / CONFIG
        names = {part.name for part in map(part_of, self.tensors) if part}
        if not beside.is_file():
            return None
        peft = self.path.name == WEIGHTS or any(key.startswith(_PEFT) for key in self.tensors)
        others = [path for path in self.path.parent.glob("*.safetensors") if path.name != self.path.name]
        if peft or (not others and ALPHA not in names):
            self.notes.append(f"ranks and alphas are those of {CONFIG} beside the file")
            return folder_strength(beside, dora=MAGNITUDE in names)
        if ALPHA not in names:
            self.notes.append(
                f"{CONFIG} beside the file is left out, because it may be that of {others[0].name}; if it is of this file, put "
                "them into a folder of their own"
            )
        return None

    def _strength(self, stem: str, stated: Mapping[str, Strength], stays: bool) -> Callable[[int | None], float]:
        """The strength of a module that has no alpha of its own, by its rank."""
        component, _, module = stem.partition(".")
        if component not in stated:
            component, module = "transformer", stem.removeprefix(_PEFT).removeprefix("transformer.")

        def scale(rank: int | None) -> float:
            if component in stated:
                found = stated[component].scale(module, rank)
                return 1.0 if stays else found
            return self.config.scale(module, rank) if self.config is not None else 1.0

        return scale

    def _as_diffusers_writes(self, stem: str, parts: list[tuple[str, Part]]) -> bool:
        """Whether a module is one whose strength diffusers itself will take from the metadata again."""
        component, _, module = stem.partition(".")
        known = component in self.text or (component == "transformer" and module in self.names.shapes)
        return known and all(part.kind in ("LoRA", "DoRA") for _, part in parts)

    def _split(self, stem: str, change: Change, places: tuple[Place, ...]) -> list[tuple[Place, Change]]:
        """The changes of the modules that share a matrix of the file."""
        sizes = [self.names.height(place.module) for place in places] if places[0].parts > 1 else [len(change.up)]
        wide = change.up.shape[1] if change.down is None else change.down.shape[1]
        rows, columns = sum(self.names.height(place.module) for place in places), self.names.width(places[0].module)
        for what, axis, found, expected in (("give", 0, len(change.up), rows), ("take", 1, wide, columns)):
            if found != expected:
                lifted = len(places) == 1 and found == self.pixels.get(places[0].module, (0, 0))[axis]
                hint = "it is of pixel tokens already and needs no lifting" if lifted else "is it the right base?"
                raise UsageError(f"module {shown(stem)}: expected to {what} {expected} numbers, found {found}; {hint}")
        return [(place, change.at(place, sizes)) for place in places]

    def _check_bias(self, stem: str, places: tuple[Place, ...]) -> None:
        bare = [place.module for place in places if place.module not in self.names.biases]
        if bare:
            raise UsageError(f"module {shown(stem)}: a difference of a bias, {bare[0]} has none; is it the right base?")

    def _claim(self, module: str, stem: str) -> None:
        if module in self.modules:
            raise UsageError(
                f"modules {shown(self.modules[module])} and {shown(stem)} are both {module}; which is meant?"
            )
        self.modules[module] = stem

    def _put(self, name: str, change: Change, module: str | None) -> None:
        """Under diffusers' keys; a convolution's A has its kernel again."""
        down, up = change.pair()
        shape = self.names.shapes[module] if module is not None else ()
        if len(shape) > 2:
            down, up = down.reshape(-1, *shape[1:]), up.reshape(*up.shape, *(1,) * (len(shape) - 2))
        self.state |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        if change.bias is not None:
            self.state[f"{name}.lora_B.bias"] = change.bias
        if change.magnitude is not None:
            self.state[f"{name}.{MAGNITUDE}"] = change.magnitude
        self.size += down.nbytes + up.nbytes
        if self.size > self.limit:
            raise UsageError(
                f"as a LoRA its changes would take more than the model itself ({self.limit / 1e9:.1f} GB): they are of full "
                "rank; merge them into the model before it is converted"
            )

    def _complete(self) -> None:
        """Biases and magnitudes for all modules of a component or none, as the loader has it."""
        prefix = "transformer."
        bases = [key.removesuffix(".lora_B.weight") for key in self.state if key.endswith(".lora_B.weight")]
        bases = [base for base in bases if base.startswith(prefix)]
        dora = [base for base in bases if f"{base}.{MAGNITUDE}" in self.state]
        if dora and len(dora) < len(bases):
            plain = next(base for base in bases if base not in dora)
            raise UsageError(
                f"DoRA on {len(dora)} of {len(bases)} modules, and not on {plain.removeprefix(prefix)}: diffusers loads DoRA for "
                "all modules of a file or for none; split it into two files"
            )
        if any(f"{base}.lora_B.bias" in self.state for base in bases):
            for base in bases:
                up = self.state[f"{base}.lora_B.weight"]
                self.state.setdefault(f"{base}.lora_B.bias", torch.zeros(len(up), dtype=up.dtype))
        if not any(self.state[f"{base}.lora_B.weight"].float().any() for base in bases):
            self.notes.append("every lora_B is zero, as before training: this LoRA changes nothing")

    def _leave_out(self, key: str, reason: str) -> None:
        self.tally.leave_out(printable(key[:160]), reason)


def _loadable_text(folder: ModelFolder) -> tuple[str, ...]:
    """Prefixes of the text encoders that the model's pipeline loads LoRAs into."""
    import diffusers

    pipeline = getattr(diffusers, str(folder.index.get("_class_name")), None)
    names = getattr(pipeline, "_lora_loadable_modules", ())
    return tuple(f"{name}." for name in names if name != "transformer")
