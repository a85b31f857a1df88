"""What a thing to import is, by its content and not by its name."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from liftkit.checkpoint.contents import FOLDED, cannot_fold, kinds_of_change, part_of
from liftkit.checkpoint.files import expanded
from liftkit.checkpoint.header import read_header
from liftkit.checkpoint.misplaced import is_hub_id, misplaced
from liftkit.errors import UsageError
from liftkit.formats.asymflow_adapter import is_asymflow_adapter
from liftkit.formats.lora_strength import CONFIG, PICKLED, WEIGHTS
from liftkit.formats.single_file import own_tensors
from liftkit.models.adapter import is_adapter

Kind = Literal["adapter", "lora", "checkpoint"]


def kind_of(source: str) -> Kind:
    """``adapter`` for a folder with one or a Hub id, ``lora`` for a folder or file with changes of weights, ``checkpoint``
    for another file.

    Raises:
        UsageError: if it is nothing, or a file of a kind that is not read; its reason comes before all questions of options.
    """
    path = expanded(source)
    if path.is_dir():
        adapter = is_adapter(path) or is_asymflow_adapter(path) or lora_file(path) is None
        return "adapter" if adapter else "lora"
    if not path.exists():
        # Something on the Hub is an adapter; a file there would have more than one slash, or an ending.
        if not is_hub_id("/".join(source.split("/")[:2])) or path.suffix in (".safetensors", ".sft"):
            raise UsageError(f"{source}: {misplaced(source)}")
        return "adapter"
    if is_asymflow_adapter(path):
        return "adapter"
    header = read_header(path)
    if not kinds_of_change(header.tensors):
        own_tensors(header)
        return "checkpoint"
    for key in header.tensors:
        part = part_of(key)
        if part is not None and part.kind not in FOLDED:
            raise UsageError(f"{source}: {cannot_fold(part.kind, key)}")
    return "lora"


def lora_file(path: Path) -> Path | None:
    """The LoRA file that a path means: the file itself, or the one in a folder of peft's or diffusers'; None if there is none.

    Raises:
        UsageError: if the folder holds a pickled LoRA, or several.
    """
    if path.is_file():
        return path
    if (path / WEIGHTS).is_file():
        return path / WEIGHTS
    if (path / CONFIG).is_file():
        what = f"only {PICKLED}, a pickle, which liftkit never opens" if (path / PICKLED).is_file() else f"no {WEIGHTS}"
        raise UsageError(f"{path}: peft's {CONFIG} and {what}; save it with safe_serialization=True")
    found = sorted(path.glob("*.safetensors"))
    # An adapter of a pixel model has its projections beside its LoRA.
    loras = [each for each in found if all(map(part_of, read_header(each).tensors))]
    if len(loras) > 1 and len(loras) == len(found):
        raise UsageError(f"{path}: {len(loras)} LoRA files, such as {loras[0].name}; give the file that is meant")
    return loras[0] if len(loras) == len(found) == 1 else None
