"""What a thing to import is, by its content and not by its name."""

from __future__ import annotations

from typing import Literal

from liftkit.checkpoint.contents import FOLDED, cannot_fold, kinds_of_change, part_of
from liftkit.checkpoint.files import expanded
from liftkit.checkpoint.header import read_header
from liftkit.checkpoint.misplaced import is_hub_id, misplaced
from liftkit.errors import UsageError
from liftkit.formats.asymflow_adapter import is_asymflow_adapter
from liftkit.formats.lora_read import lora_file
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
