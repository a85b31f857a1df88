"""The components of a pipeline folder: which files each is made of, and what an interrupted download left out of it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from liftkit.checkpoint.model import ModelFolder
from liftkit.checkpoint.source import PICKLES, list_files, open_regular
from liftkit.checkpoint.text import LFS, check_unmarked, read_json
from liftkit.checkpoint.weights import STEMS, Library, Weights, read_weights
from liftkit.embedded import MODELS, VAES
from liftkit.errors import UsageError
from liftkit.tally import Tally

SCHEDULER, CONFIG, GUIDER = "scheduler_config.json", "config.json", "guider_config.json"
LATENT_VAE = "latent/vae"
"""Where a converted folder keeps the VAE of its source."""
# Any one of these groups is a vocabulary.
VOCABULARIES = (
    ("tokenizer.json",), ("vocab.json", "merges.txt"), ("spiece.model",), ("tokenizer.model",), ("vocab.txt",),
    ("sentencepiece.bpe.model",), ("tekken.json",), ("tiktoken.model",),
)  # fmt: skip
SCHEDULE = {
    "num_train_timesteps": (1, 100_000), "shift": (1e-4, 1e4), "flow_shift": (1e-4, 1e4), "pixel_shift": (1e-4, 1e4),
    "base_shift": (-100, 100), "max_shift": (-100, 100), "shift_terminal": (0, 1), "lift_scale": (1e-6, 1e6),
    "base_image_seq_len": (1, 1e9), "max_image_seq_len": (1, 1e9), "pixel_shift_side": (1, 1e6), "patch_size": (1, 1024),
}  # fmt: skip
"""Ranges of the numbers in a scheduler's config, far wider than any that is in use."""
BYTES = ("ByT5Tokenizer", "CanineTokenizer", "PerceiverTokenizer")
"""Tokenizers whose vocabulary is the bytes or the characters themselves."""


MOST_LAYERS = 1000
"""Layers that a config may name whatever its weights hold: quantized ones are not counted here."""
COUNTED = ("layers", "blocks", "depth")
"""What keys with numbers of modules have in their names."""
SIZES = {"pos_embed_max_size": 512, "sample_size": 1024, "image_size": 16_384, "max_position_embeddings": 2**24}
COUNTS_POSITIONS = ("AuraFlowTransformer2DModel",)
"""Classes whose ``pos_embed_max_size`` is the number of positions, and no side of a square of them."""
SIZES |= dict.fromkeys(("axes_lens", "rope_max_seq_len", "rope_max_len", "max_seq_len", "max_sequence_length"), 2**20)
"""The largest sides and lengths that tables of positions are computed for, far beyond any that is in use."""
LARGEST = 2**40
"""Of any other whole number in a config."""
MOST_BYTES = 512 * 1024 * 1024
"""Of a file beside the weights; vocabularies, the largest of them, take some tens of MB."""


@dataclass(frozen=True)
class Component:
    """One component, checked.

    Args:
        name: its folder, below that of the pipeline.
        library: whose class it is, such as ``diffusers``.
        class_name: its class.
        path: the folder.
        weights: of a model; None for tokenizers, schedulers, guiders and processors.
        files: what belongs to it, by the names under which every loader finds it: without a variant.
        index: the text of the weights' index, where it has to name the shards anew.
        left_out: files that no loader reads, such as pickles and other variants.
    """

    name: str
    library: str
    class_name: str
    path: Path
    weights: Weights | None
    files: dict[str, Path]
    index: dict[str, str] = field(default_factory=dict)
    left_out: Tally = field(default_factory=lambda: Tally("files"))

    @property
    def quantized(self) -> str:
        """How its weights are quantized, as its config says; empty if they are not."""
        if self.weights is None:
            return ""
        found = read_json(self.path / CONFIG).get("quantization_config")
        return str(found.get("quant_method") or "in a way of its own") if isinstance(found, dict) else ""


def read_components(folder: ModelFolder) -> list[Component]:
    """Every component that ``model_index.json`` lists; those that it sets to null are none.

    Raises:
        UsageError: naming the component and the file that is missing or broken.
    """
    return [read_component(folder, name) for name in folder.components]


def read_component(folder: ModelFolder, name: str) -> Component:
    """One component of a pipeline, or :data:`LATENT_VAE`.

    Raises:
        UsageError: naming the file that is missing or broken.
    """
    path = folder.path / name
    if not path.is_dir():
        raise UsageError(f"{path}: missing, though model_index.json lists it; is the model folder complete?")
    files = {file.relative_to(path).as_posix(): file for file in list_files(path, folder.home)}
    for file in files.values():
        if file.suffix not in (".safetensors", *PICKLES) and file.stat().st_size > MOST_BYTES:
            raise UsageError(
                f"{file}: {file.stat().st_size} bytes, {MOST_BYTES} at most for a file that holds no weights"
            )
        if file.suffix == ".json":
            check_unmarked(file)
    library, class_name = _class_of(folder, name)
    if "Scheduler" in class_name or name == "scheduler":
        _check_schedule(path / SCHEDULER)
    elif "Tokenizer" in class_name or "Processor" in class_name or "FeatureExtractor" in class_name:
        if "Tokenizer" in class_name or "tokenizer_config.json" in files:
            _check_vocabulary(path, class_name)
        elif not any(file.endswith(".json") for file in files):
            raise UsageError(f"{path}: no configuration of the {class_name}; is the model folder complete?")
    elif library in STEMS and GUIDER not in files:
        return _model(name, library, class_name, path, files)
    kept = {relative: file for relative, file in files.items() if file.suffix not in PICKLES}
    component = Component(name, library, class_name, path, None, kept)
    for relative in sorted(files.keys() - kept.keys()):
        component.left_out.leave_out(f"{name}/{relative}", "pickles")
    return component


def _check_schedule(file: Path) -> None:
    """Raise unless the numbers that noise levels are made of are in their ranges: libraries divide by them and allocate so many."""
    config = read_json(file)
    for key, (least, most) in SCHEDULE.items():
        value = config.get(key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            raise UsageError(
                f"{file}: {key} is {value!r:.60}, expected a number from {least:g} to {most:g}; fetch it again"
            )


def read_vae(path: Path) -> Component:
    """The VAE in a folder of its own, in that of a pipeline, or an embedded one by its name.

    Raises:
        UsageError: if there is none, or a file is missing or broken.
    """
    path = VAES.get(str(path)) or MODELS.get(str(path), path)
    place = path if (path / CONFIG).is_file() else path / "vae"
    if not (place / CONFIG).is_file():
        raise UsageError(
            f"{path}: no VAE; give a folder with the config.json and weights that diffusers saves, a pipeline's folder, or "
            "'taef2' for FLUX.2's"
        )
    files = {file.relative_to(place).as_posix(): file for file in list_files(place, place)}
    return _model("vae", "diffusers", str(read_json(place / CONFIG).get("_class_name")), place, files)


def _class_of(folder: ModelFolder, name: str) -> tuple[str, str]:
    if name != LATENT_VAE:
        return str(folder.index[name][0]), str(folder.class_of(name))
    return "diffusers", str(read_json(folder.path / name / CONFIG).get("_class_name"))


def _model(name: str, library: Library | str, class_name: str, path: Path, files: dict[str, Path]) -> Component:
    config = read_json(path / CONFIG)
    weights = read_weights(path, library, quantized="quantization_config" in config)  # type: ignore[arg-type]
    tables = config if "Transformer" in class_name else {**config, "sample_size": None}  # a VAE computes none
    _check_numbers(path / CONFIG, tables, len(weights.where))
    names = weights.plain_names()
    component = Component(name, library, class_name, path, weights, {}, {})
    for relative, file in files.items():
        if relative in names:
            component.files[names[relative]] = file
        elif relative == weights.index:
            _add_index(component, file, names)
        elif why := _unread(relative, STEMS[library]):  # type: ignore[index]
            component.left_out.leave_out(f"{name}/{relative}", why)
        else:
            component.files[relative] = file
    return component


def _check_numbers(file: Path, config: dict[str, Any], tensors: int) -> None:
    """Raise if a config names more than its weights can hold: libraries build layer after layer, and compute tables of positions,
    before they compare."""
    for key, value in config.items():
        if isinstance(value, dict):
            _check_numbers(file, value, tensors)
            continue
        numbers = [each for each in (value if isinstance(value, list) else [value]) if isinstance(each, int)]
        if any(part in key for part in COUNTED) and max(numbers, default=0) > max(tensors, MOST_LAYERS):
            raise UsageError(
                f"{file}: {key} is {value!r:.20}, but the weights are {tensors} tensors; fetch the model again"
            )
        most = SIZES.get(key, LARGEST)
        if key == "pos_embed_max_size" and str(config.get("_class_name")).removeprefix("Asym") in COUNTS_POSITIONS:
            most = most**2
        if max(map(abs, numbers), default=0) > most:
            raise UsageError(f"{file}: {key} is {value!r:.20}, {most} at most; fetch the model again")


def _add_index(component: Component, file: Path, names: dict[str, str]) -> None:
    """The index of the weights, under its plain name; its text where the shards' names change."""
    index = read_json(file)
    stem = STEMS[component.library]  # type: ignore[index]
    if all(old == new for old, new in names.items()):
        component.files[f"{stem}.safetensors.index.json"] = file
        return
    index["weight_map"] = {key: names[shard] for key, shard in index["weight_map"].items()}
    component.index[f"{stem}.safetensors.index.json"] = json.dumps(index, indent=2) + "\n"


def _unread(relative: str, stem: str) -> str:
    """Why a file beside the weights is left out; empty if it is not."""
    if relative.endswith(PICKLES):
        return "pickles"
    if relative.endswith((".msgpack", ".h5", ".onnx", ".onnx_data", ".gguf")):
        return "weights of another format"
    if relative.startswith(f"{stem}.") or (relative.startswith(f"{stem}-") and relative.endswith(".safetensors")):
        return "weights of another variant"
    return ""


def _check_vocabulary(path: Path, class_name: str) -> None:
    """Raise unless a tokenizer's folder holds a vocabulary: without one, prompts mean nothing, and no library complains."""
    found = [group for group in VOCABULARIES if all((path / name).is_file() for name in group)]
    if not found and not any(path.glob("*.tiktoken")) and class_name not in BYTES:
        halves = [name for group in VOCABULARIES for name in group if (path / name).is_file()]
        beside = f" ({halves[0]} alone does not do)" if halves else ""
        raise UsageError(
            f"{path}: no vocabulary{beside}: expected {', or '.join(' and '.join(group) for group in VOCABULARIES[:5])}; "
            "fetch the model again"
        )
    for group in found:
        for name in group:
            _check_content(path / name)


def _check_content(file: Path) -> None:
    if file.suffix == ".json":
        content = read_json(file)
        model = content.get("model") if file.name == "tokenizer.json" else content
        vocabulary = model.get("vocab") if file.name == "tokenizer.json" and isinstance(model, dict) else model
        if not vocabulary:
            raise UsageError(f"{file}: it holds no vocabulary; fetch the file again")
        return
    with open_regular(file) as opened:
        start = opened.read(len(LFS))
    if not start:
        raise UsageError(f"{file}: empty; fetch the file again")
    if start == LFS:
        raise UsageError(f"{file}: a git-lfs pointer, not the file itself; run 'git lfs pull'")
