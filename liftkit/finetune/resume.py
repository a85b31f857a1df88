"""Going on with a run: which run and checkpoint are meant, by which recipe, and what is another one now.

A run folder's own recipe is what goes on. Whatever is asked for beside it is compared with the recipe that the checkpoint was
made by: another model is refused, other keys are listed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from liftkit.checkpoint.files import expanded
from liftkit.checkpoint.folder import manifest
from liftkit.checkpoint.hashing import TABLE, hexadecimal, named_digests
from liftkit.checkpoint.model import ModelFolder
from liftkit.checkpoint.record import like
from liftkit.checkpoint.record import read_record as folder_record
from liftkit.checkpoint.text import read_text
from liftkit.embedded import MODELS
from liftkit.errors import UsageError
from liftkit.finetune.recipe import Recipe
from liftkit.finetune.recipe_file import load_recipe
from liftkit.finetune.recipe_paths import paths_from
from liftkit.finetune.run_folder import RunFolder, resume_command, run_record
from liftkit.finetune.state import RECORD, find_checkpoint, read_record

FIXED = (
    "space", "trainable.mode", "trainable.rank", "trainable.head", "trainable.head.channels", "trainable.head.depth",
    "ema.enabled",
)  # fmt: skip
"""Keys that say which tensors there are: a run cannot change them."""
ASIDE = ("output", "data.", "checkpoints.", "previews.", "validation.", "trackers", "threads", "save", "base.offload")
"""Keys that leave the weights as they are; of the data there is a digest."""


@dataclass(frozen=True)
class Change:
    """One key of a recipe that is another one now.

    Args:
        key: dotted, such as ``optimizer.learning_rate``.
        before, now: plain values; None where there is none.
    """

    key: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.key} was {json.dumps(self.before)}, it is {json.dumps(self.now)} now"


@dataclass(frozen=True)
class Resumption:
    """A run that goes on.

    Args:
        run: its folder.
        checkpoint: that it goes on from.
        step: steps done by then.
        changes: of the recipe, since the checkpoint was made.
        model: of the checkpoint, see :func:`model_record`; empty where it does not say.
    """

    run: Path
    checkpoint: Path
    step: int
    changes: list[Change] = field(default_factory=list)
    model: dict[str, Any] = field(default_factory=dict)

    def notes(self) -> Iterator[str]:
        """What a user has to know before the run goes on."""
        for change in self.changes:
            yield f"{self.run}: {change}"
        if any(not change.key.startswith(ASIDE) for change in self.changes if change.key != "steps"):
            yield f"{self.run}: goes on from step {self.step}, but not as it would have by its own recipe"


def open_run(resume: str, recipe: str | None, overrides: Sequence[str], output: Path | None) -> tuple[Recipe, str]:
    """The recipe by which a run goes on, and the checkpoint that is meant (``latest`` or a path).

    Args:
        resume: ``latest``, a run folder, or a checkpoint.
        recipe: a recipe file or shipped name; None for the run's own.
        overrides: ``section.key=value``.
        output: the run folder, where it is given separately.

    Raises:
        UsageError: if it is not clear which run is meant, there is none, or the recipe is wrong.
    """
    run, checkpoint = _meant(resume)
    place = output or run
    given = [*overrides, *([f"output={json.dumps(str(place))}"] if place is not None else [])]
    if recipe is not None:
        return load_recipe(recipe, given), checkpoint
    home = run or output
    if home is None:
        raise UsageError("--resume latest: of which run? Give its folder: --resume runs/NAME, or -o runs/NAME")
    return _own_recipe(home, given), checkpoint


def find_resumption(recipe: Recipe, resume: str) -> Resumption:
    """What a run goes on from, compared with what it would be now; nothing is loaded.

    Args:
        recipe: by which it goes on.
        resume: ``latest``, or the path of a checkpoint.

    Raises:
        UsageError: if there is no checkpoint, another run is in the output folder, or the recipe cannot go on from it.
    """
    folder = RunFolder(recipe.output)
    checkpoint = find_checkpoint(folder.checkpoints, resume)
    run = _home(checkpoint) or folder.path
    if run.resolve() != folder.path.resolve() and folder.log_file.exists():
        raise UsageError(
            f"output: {folder.path}: holds another run than {checkpoint}; go on in {run}, or choose a new output"
        )
    record = read_record(checkpoint)
    before = record.get("recipe")
    now = recipe.model_dump(mode="json")
    changes = compare_recipes(before, now) if isinstance(before, dict) else []
    model = record.get("model") or run_record(run).get("model", {})
    found = Resumption(run, checkpoint, int(record["step"]), changes, model if isinstance(model, dict) else {})
    _check_fixed(found)
    return found


def compare_recipes(before: dict[str, Any], now: dict[str, Any]) -> list[Change]:
    """The keys that differ between two recipes as plain data, but for where the output goes."""
    old, new = _leaves(before), _leaves(now)
    return [
        Change(key, old.get(key), new.get(key))
        for key in sorted(old.keys() | new.keys())
        if key != "output" and old.get(key) != new.get(key)
    ]


def model_record(folder: ModelFolder, before: Resumption | None = None) -> dict[str, Any]:
    """What tells a model from others: its name, class, and digests by weight file.

    The digests are those that its own ``liftkit.json`` holds; of a folder without one they are taken of the transformer.

    Args:
        folder: of the model.
        before: a run to compare with, whose checkpoint may have digests by the hash of an older version.
    """
    digests = folder_record(folder.path).get(TABLE) or {
        f"transformer/{name}": digest for name, digest in manifest(folder.path / "transformer").items()
    }
    if before is not None:
        digests = like(named_digests(before.model), digests, folder.path)
    return {"name": folder.name, "class": folder.class_of("transformer"), TABLE: digests}


def check_model(resumption: Resumption, now: dict[str, Any]) -> None:
    """Raise unless a run goes on with the model that it began with.

    Args:
        resumption: of the run.
        now: the :func:`model_record` of the recipe's model.

    Raises:
        UsageError: naming both.
    """
    before = resumption.model
    if not before:
        return
    old, new = _weights(before), _weights(now)
    if before.get("class", now["class"]) != now["class"]:
        _refuse(
            resumption, "architecture", f"{before.get('name')} ({before['class']})", f"{now['name']} ({now['class']})"
        )
    lift = "lift.safetensors"
    if old.get(lift) != new.get(lift):
        _refuse(resumption, "lift", _called(before, lift), _called(now, lift))
    different = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    if different:
        _refuse(resumption, "model", _called(before, different[0]), _called(now, different[0]))


def _meant(resume: str) -> tuple[Path | None, str]:
    """The run folder that ``--resume`` names, if it does, and the checkpoint."""
    if resume == "latest":
        return None, resume
    path = expanded(resume)
    if (path / RECORD).is_file():
        return _home(path), str(path)
    if path.name == "checkpoints" and path.is_dir():
        return path.parent, "latest"
    if run_record(path) or (path / "checkpoints").is_dir():
        return path, "latest"
    if not path.exists():
        raise UsageError(f"--resume {resume}: no such folder; give a run folder, one of its checkpoints, or 'latest'")
    raise UsageError(
        f"--resume {resume}: no run and no complete checkpoint (no run.json, no {RECORD} there); "
        "give a run folder, one of its checkpoints, or 'latest'"
    )


def _home(checkpoint: Path) -> Path | None:
    """The run folder that a checkpoint lies in, if it does."""
    above = checkpoint.absolute().parent
    return checkpoint.parent.parent if above.name == "checkpoints" else None


def _own_recipe(run: Path, overrides: list[str]) -> Recipe:
    file = run / "recipe.yaml"
    if not file.is_file():
        raise UsageError(f"--resume: {file}: no such file; name the recipe that the run was started with")
    began = run_record(run).get("directory")
    # Paths of a recipe are relative to where it was started, which may be another directory than this.
    moved = paths_from(read_text(file), Path(began)) if isinstance(began, str) else {}
    return load_recipe(file, [*(f"{key}={json.dumps(value)}" for key, value in moved.items()), *overrides])


def _check_fixed(found: Resumption) -> None:
    by_key = {change.key: change for change in found.changes}
    model = by_key.get("model")
    # The embedded model would be converted first; its name says enough.
    if model is not None and {model.before, model.now} & MODELS.keys():
        _refuse(found, "model", str(model.before), str(model.now))
    for key in FIXED:
        if key in by_key:
            raise UsageError(f"--resume {found.run}: {by_key[key]}; {_advice(found.run)}")
    adversarial = by_key.get("objective.adversarial")
    if adversarial is not None and not adversarial.before:
        raise UsageError(
            f"--resume {found.run}: {adversarial}, and the checkpoint has no discriminators; {_advice(found.run)}"
        )


def _refuse(found: Resumption, what: str, before: str, now: str) -> None:
    raise UsageError(
        f"--resume {found.run}: another {what}: the run trains {before}, the recipe's is {now}; {_advice(found.run)}"
    )


def _advice(run: Path) -> str:
    return f"go on by the run's own recipe ({resume_command(run)}), or start another run with another output"


def _called(model: dict[str, Any], file: str) -> str:
    digest = _weights(model).get(file)
    return f"{model.get('name')} ({file} {hexadecimal(digest)[:8] if digest else 'missing'})"


def _weights(model: dict[str, Any]) -> dict[str, str]:
    return {name: digest for name, digest in named_digests(model).items() if name.endswith(".safetensors")}


def _leaves(table: dict[str, Any], lead: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in table.items():
        result |= _leaves(value, f"{lead}{key}.") if isinstance(value, dict) else {f"{lead}{key}": value}
    return result
