"""What a path is that was given where a model or an adapter folder is expected, and where it belongs."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

from liftkit.checkpoint.contents import kinds_of_change, no_transformer, quantization
from liftkit.checkpoint.files import expanded
from liftkit.checkpoint.header import read_header
from liftkit.embedded import MODELS, VAES
from liftkit.errors import UsageError

_WEIGHTS = (".safetensors", ".sft", ".gguf", ".ckpt", ".pt", ".pth", ".bin")
_ADDRESS = re.compile(r"(?:https?://(?:www\.)?(?:huggingface\.co|hf\.co)/|hf://)([\w.-]+/[\w.-]+)")
_LORA_FILES = ("adapter_config.json", "pytorch_lora_weights.safetensors")


def is_hub_id(model: str) -> bool:
    """Whether a name has the form of a Hub id, organization/name."""
    return model.count("/") == 1 and not model.startswith((".", "/", "~")) and "\\" not in model


def check_named(value: str, what: str, flag: str = "") -> None:
    """Raise unless something is there that a name on the command line may mean; only whoever reads it knows whether it will do.

    Args:
        value: the name; those of embedded models and data, numbers, and of models whatever may be on the Hub, pass.
        what: what it is to be: ``file``, ``folder``, ``path`` for either, or ``model`` for a model or an adapter.
        flag: of the option, with a space behind it; empty for an argument.

    Raises:
        UsageError: if nothing is there.
    """
    kind = "file or folder" if what == "path" else what
    if not value:
        raise UsageError(f"{flag}'': an empty name, which would be the current folder's; give that of a {kind}")
    path = expanded(value)
    if value in (*MODELS, *VAES) or value.isdecimal() or os.path.exists(path):
        return
    if what != "model":
        raise UsageError(f"{flag}{value}: no such {kind}{near(path) or '; check the path'}")
    # A file on the Hub has more than one slash.
    if not is_hub_id("/".join(value.split("/")[:2])) or (path.suffix in _WEIGHTS and value.count("/") == 1):
        raise UsageError(f"{flag}{value}: {misplaced(value)}")


def misplaced(source: str) -> str:
    """In words, after a colon: what a file is, or that there is nothing, and what to do instead."""
    path = expanded(source)
    if not path.exists():
        address = _ADDRESS.match(source)
        if address is not None:
            return f"an address; did you mean the Hub id {address[1]}?"
        like_file = path.suffix in _WEIGHTS
        what = "no such file" if like_file else "no such folder, and no Hub id of the form organization/name"
        return f"{what}{near(path)}"
    for folder, file, what in (
        (path.parent, "liftkit.json", "folder"),
        (path.parent.parent, "model_index.json", "model"),
    ):
        if (folder / file).is_file():
            return f"a file of the {what} {folder}; give that"
    try:
        tensors = read_header(path).tensors
    except UsageError as error:
        if path.suffix not in _WEIGHTS:
            return "a file that holds no weights; a model is a diffusers folder, or a Hub id"
        # Its message names the file already.
        return f"a single file, no folder: {str(error).removeprefix(f'{path}: ')}"
    kinds = kinds_of_change(tensors)
    if kinds:
        return f"{' and '.join(kinds)} in a single file, no model and no adapter folder; {lora_advice(source)}"
    found = quantization(tensors)
    if found is not None:
        return f"a single file, quantized: {found}; give the full-precision model"
    other = no_transformer(tensors)
    if other:
        return f"a single file: {other}"
    return f"a single file; liftkit import {source} --config MODEL -o FOLDER makes a diffusers folder of it"


def no_pipeline(path: Path, source: str) -> str:
    """After what was said of it: what a folder without model_index.json is, and what to do instead; empty if nothing shows it."""
    inner = sorted(path.glob("*/model_index.json")) or sorted(path.glob("snapshots/*/model_index.json"))
    if lora_folder(path):
        return f"; it holds a LoRA: {lora_advice(source)}"
    if (path / "modular_model_index.json").is_file():
        return (
            ", it is a modular one: in memory liftkit.convert_transformer lifts its transformer, commands need a whole "
            "pipeline's folder"
        )
    if inner:
        return f"; did you mean {inner[0].parent}?"
    if (path.absolute().parent / "model_index.json").is_file():
        return f"; it is a component, did you mean {path.absolute().parent}?"
    files = [file for file in sorted(path.iterdir()) if file.suffix in _WEIGHTS]
    return f"; it holds {files[0].name}, {misplaced(str(files[0]))}" if len(files) == 1 else ""


def lora_advice(source: str) -> str:
    """What to do with a LoRA of a latent model."""
    return (
        f"liftkit import {source} --base CONVERTED -o OUT.safetensors makes a LoRA for a converted model, which its pipeline "
        "loads by load_lora_weights"
    )


def lora_folder(path: Path) -> bool:
    """Whether a folder is one of a LoRA, as peft and diffusers save it."""
    return any((path / name).is_file() for name in _LORA_FILES)


def near(path: Path) -> str:
    """``; did you mean X?`` for a name that is much like one that is there."""
    try:
        names = os.listdir(path.parent)
    except (OSError, ValueError):
        return ""
    found = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.with_name(found[0])}?" if found else ""
