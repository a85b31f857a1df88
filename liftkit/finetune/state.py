"""Checkpoints of a run: complete or absent, and read back to the last bit."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from liftkit.checkpoint.files import read_safetensors, reason, write_safetensors, write_text
from liftkit.checkpoint.folder import atomic_folder
from liftkit.checkpoint.leftovers import discard
from liftkit.checkpoint.model import read_json
from liftkit.errors import LiftkitError, UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

RECORD = "state.json"
_NAME = re.compile(r"step-(\d+)")


def write_checkpoint(
    folder: Path, step: int, tensors: dict[str, dict[str, Tensor]], record: dict[str, Any], keep: int
) -> Path:
    """Write one checkpoint, and only then remove the oldest beyond ``keep``.

    Args:
        folder: that holds all of a run's.
        step: steps done.
        tensors: files by stem, tensors by name.
        record: plain data; the file that says the checkpoint is complete, written last.
        keep: how many stay.

    Raises:
        LiftkitError: if the disk refuses; the older ones are still there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / f"step-{step:07d}"
    with atomic_folder(place) as building:
        for stem, content in tensors.items():
            write_safetensors(building / f"{stem}.safetensors", content)
        write_text(
            building / RECORD,
            json.dumps({"format": "liftkit.state", "version": 1, "step": step, **record}, indent=2) + "\n",
        )
    prune(folder, keep)
    return place


def prune(folder: Path, keep: int) -> None:
    """Remove the oldest complete checkpoints beyond ``keep``.

    Raises:
        LiftkitError: if one cannot be removed.
    """
    for _, old in checkpoints(folder)[:-keep]:
        _remove(old)


def tidy_checkpoints(folder: Path) -> None:
    """Remove what is left of checkpoints that were being removed when their run died: such have no record, or half of it."""
    if folder.is_dir():
        for path in [each for each in folder.iterdir() if _NAME.fullmatch(each.name) and each.is_dir()]:
            if not (path / RECORD).is_file():
                _remove(path)


def _remove(path: Path) -> None:
    failed = discard(path)
    if failed is not None:
        raise LiftkitError(f"{path}: this old checkpoint cannot be removed ({reason(failed)}); remove it by hand")


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """The complete checkpoints of a run, oldest first, with their steps."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return sorted((step, path) for step, path in found if (path / RECORD).is_file())


def abandon_after(folder: Path, step: int) -> list[Path]:
    """Take checkpoints of later steps out of the run, which goes on from ``step``: they keep their files under another name.

    Returns:
        Where they are now.
    """
    moved = []
    for _, path in [each for each in checkpoints(folder) if each[0] > step]:
        aside = path.with_name(f"{path.name}.abandoned")
        if aside.exists():
            _remove(aside)
        moved.append(path.rename(aside))
    return moved


def find_checkpoint(folder: Path, wanted: str) -> Path:
    """The checkpoint that ``--resume`` means: ``latest``, or a path.

    Raises:
        UsageError: if there is none: a run never starts afresh in silence.
    """
    if wanted == "latest":
        found = checkpoints(folder)
        if not found:
            raise UsageError(
                f"--resume: {folder}: no complete checkpoint; leave --resume out and choose a new output to start a run"
            )
        return found[-1][1]
    path = Path(wanted)
    if not (path / RECORD).is_file():
        raise UsageError(
            f"--resume {wanted}: no complete checkpoint (no {RECORD} there); give one of {folder}, or 'latest'"
        )
    return path


def read_checkpoint(path: Path, stems: list[str]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """What :func:`write_checkpoint` wrote.

    Raises:
        UsageError: if a file is missing or broken.
    """
    record = read_record(path)
    return {stem: read_safetensors(path / f"{stem}.safetensors")[0] for stem in stems}, record


def read_record(path: Path) -> dict[str, Any]:
    """The record of a checkpoint: ``step``, ``recipe``, ``data`` and ``model``.

    Raises:
        UsageError: if it is missing or broken.
    """
    record = read_json(path / RECORD)
    if record.get("format") != "liftkit.state" or record.get("version") != 1:
        raise UsageError(f"{path / RECORD}: not a state that this version reads")
    if type(record.get("step")) is not int:
        raise UsageError(
            f"{path / RECORD}: no number of steps in it; the file is broken, resume from another checkpoint"
        )
    return record


def optimizer_tensors(
    optimizers: list[torch.optim.Optimizer], parameters: dict[str, nn.Parameter]
) -> dict[str, Tensor]:
    """The state of optimizers as ``parameter/entry``, whole even where parameters are sharded."""
    import torch

    names = {id(parameter): name for name, parameter in parameters.items()}
    result = {}
    for optimizer in optimizers:
        for parameter, entries in optimizer.state.items():
            for entry, value in entries.items():
                result[f"{names[id(parameter)]}/{entry}"] = whole(torch.as_tensor(value))
    return result


def load_optimizers(
    optimizers: list[torch.optim.Optimizer], parameters: dict[str, nn.Parameter], tensors: dict[str, Tensor]
) -> None:
    """Read what :func:`optimizer_tensors` gave.

    Raises:
        UsageError: if it belongs to other parameters.
    """
    entries: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, entry = key.rpartition("/")
        entries.setdefault(name, {})[entry] = value
    if set(entries) - set(parameters):
        raise UsageError(
            f"checkpoint: optimizer state of {sorted(set(entries) - set(parameters))[0]}, which does not learn in this recipe"
        )
    names = {id(parameter): name for name, parameter in parameters.items()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                for entry, value in entries.get(names[id(parameter)], {}).items():
                    placed = like(value, parameter)
                    # A fused optimizer counts its steps on the parameter's device, others on the CPU.
                    counts = value.ndim == 0 and group.get("fused")
                    optimizer.state[parameter][entry] = placed.to(parameter.device) if counts else placed


def load_parameters(targets: dict[str, Tensor], tensors: dict[str, Tensor], what: str) -> None:
    """Copy tensors into place, by name.

    Raises:
        UsageError: if names or shapes differ.
    """
    import torch

    if set(targets) != set(tensors):
        odd = sorted(set(targets) ^ set(tensors))[0]
        raise UsageError(
            f"{what}: {odd} is {'missing' if odd in targets else 'not part of this recipe'}; resume with the recipe that made it"
        )
    for name, target in targets.items():
        if target.shape != tensors[name].shape:
            raise UsageError(
                f"{what}: {name} has shape {tuple(tensors[name].shape)}, this recipe's has {tuple(target.shape)}"
            )
        with torch.no_grad():
            target.copy_(like(tensors[name], target))


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered (every process has to ask), others as they are; on the CPU."""
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach().cpu()


def like(value: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor placed as a parameter is: on its device, and sharded like it where shapes agree."""
    if hasattr(parameter, "device_mesh") and value.shape == parameter.shape:
        from torch.distributed.tensor import distribute_tensor

        sharded: Any = parameter
        return distribute_tensor(value.to(parameter.device), sharded.device_mesh, sharded.placements)
    # A copy, because a file's tensors are not aligned in memory as torch's own are, and products round by alignment.
    return value.clone() if value.ndim == 0 else value.to(parameter.device, copy=True)
