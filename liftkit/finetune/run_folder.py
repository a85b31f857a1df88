"""The folder of a run: its recipe, log, checkpoints, previews and result, and the files that ask it to act."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from liftkit.checkpoint.files import reason, write_text
from liftkit.checkpoint.leftovers import sweep_inside
from liftkit.checkpoint.lock import claim
from liftkit.checkpoint.model import read_json
from liftkit.checkpoint.record import versions
from liftkit.device import launched_on_cpu
from liftkit.errors import LiftkitError, UsageError
from liftkit.finetune.recipe import Recipe
from liftkit.finetune.state import checkpoints, tidy_checkpoints
from liftkit.progress import first_process


class RunFolder:
    """``recipe.yaml``, ``run.json``, ``log.jsonl``, ``checkpoints/``, ``previews/``, ``cache/`` and the result.

    Args:
        path: of the run; made when it begins.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.log_file = path / "log.jsonl"
        self.checkpoints = path / "checkpoints"
        self.previews = path / "previews"

    def result(self, recipe: Recipe) -> Path:
        """Where the result goes."""
        return self.path / recipe.save

    @property
    def begun(self) -> bool:
        """Whether a run is here, however far it came."""
        return any((self.path / name).is_file() for name in ("recipe.yaml", "run.json", "log.jsonl"))

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the folder while a run is at work in it; of many processes the first does. What dead runs left in it goes.

        Raises:
            UsageError: if another run is at work there, or nothing can be written.
        """
        if not first_process():
            yield
            return
        with claim(self.path, inside=True):
            sweep_inside(self.path)
            tidy_checkpoints(self.checkpoints)
            yield

    @property
    def has_work(self) -> bool:
        """Whether a run left something here that another one would have to go on from, or would lose."""
        return bool(checkpoints(self.checkpoints)) or any((self.path / name).exists() for name in ("model", "adapter"))

    def resumed(self, resume: str | None, note: Callable[[str], None]) -> str | None:
        """What a run really goes on from: ``resume``, or None where the run here ended before its first checkpoint.

        Such a run begins again at step 0. Nothing is changed here: who begins it drops its log by :meth:`rewind`.

        Args:
            resume: ``latest``, the path of a checkpoint, or None.
            note: called with a line about a run that begins again.
        """
        if resume not in (None, "latest") or self.has_work or not self.begun:
            return resume
        if not self.log_file.exists() and resume is None:
            return None
        note(f"{self.path}: the run there ended before its first checkpoint; it begins again at step 0")
        return None

    def check(self, resuming: bool) -> None:
        """Raise unless a run may begin here.

        Raises:
            UsageError: if another run is here and is not resumed, or a model, whose files would be mixed with the run's.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"output: {self.path}: is a file; the output is a folder")
        place = self.path.absolute()
        model = next((each for each in (place, *place.parents) if (each / "model_index.json").is_file()), None)
        if model is not None:
            raise UsageError(f"output: {self.path}: inside of the model {model}; choose another output")
        # A run that saved nothing may be begun again.
        if not resuming and self.log_file.exists() and (self.has_work or not run_record(self.path)):
            raise UsageError(
                f"output: {self.path}: holds a run already; go on with it by {resume_command(self.path)}, "
                "or choose another output"
            )

    def begin(
        self,
        recipe: Recipe,
        sources: list[dict[str, Any]],
        model: dict[str, Any],
        resumed: dict[str, Any] | None = None,
    ) -> None:
        """Write what the run is made of: the resolved recipe, versions, and digests of model and data.

        Args:
            recipe: by which it goes on; comments in ``recipe.yaml`` keep what it was before.
            sources: of the data, plain.
            model: what tells it from others, plain.
            resumed: ``step`` and ``changes`` (lines) of a run that goes on.
        """
        self.previews.mkdir(parents=True, exist_ok=True)
        history = [*run_record(self.path).get("resumed", []), *([resumed] if resumed else [])]
        comments = [f"# Since step {each['step']}: {line}\n" for each in history for line in each["changes"]]
        write_text(self.path / "recipe.yaml", "".join(comments) + recipe.to_yaml())
        record = {"format": "liftkit.run", "version": 1, "model": model, "data": sources, "versions": versions()}
        record |= {"directory": os.getcwd(), "resumed": history}
        write_text(self.path / "run.json", json.dumps(record, indent=2) + "\n")

    def log(self, row: dict[str, Any]) -> None:
        """Add a line to the log.

        Raises:
            LiftkitError: if the disk refuses.
        """
        try:
            with self.log_file.open("a") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise LiftkitError(
                f"{self.log_file}: {reason(error)}; mend that, and go on by {resume_command(self.path)}"
            ) from error

    def rewind(self, step: int) -> None:
        """Drop the lines of steps after ``step``, which a resumed run does again."""
        if self.log_file.exists():
            rows = self.log_file.read_text().splitlines()
            kept = [row for row in rows if _step(row) <= step]
            write_text(self.log_file, "".join(f"{row}\n" for row in kept))

    def asked(self, what: str) -> bool:
        """Whether somebody touched the file ``save`` or ``stop``; it goes when it is noticed."""
        path = self.path / what
        if not path.exists():
            return False
        path.unlink(missing_ok=True)
        return True


def resume_command(run: Path) -> str:
    """The command that goes on with a run, as it can be pasted into a shell."""
    return f"{_launcher(os.environ)}liftkit finetune --resume {shlex.quote(str(run))}"


def _launcher(environment: Mapping[str, str]) -> str:
    """What starts as many processes as there are, on as many machines; of each of these its own line."""
    processes = int(environment.get("WORLD_SIZE", "1"))
    here = int(environment.get("LOCAL_WORLD_SIZE", processes))
    if processes == 1:
        return ""
    if launched_on_cpu() and here == processes:
        return f"torchrun --nproc_per_node {processes} -m "
    words = ["accelerate launch"]
    sharded = environment.get("ACCELERATE_USE_FSDP") == "true"
    words.append(f"--use_fsdp --fsdp_version {environment.get('FSDP_VERSION', '2')}" if sharded else "--multi_gpu")
    if here < processes:
        words.append(f"--num_machines {processes // here} --machine_rank {environment.get('GROUP_RANK', '0')}")
        words.append(f"--main_process_ip {environment.get('MASTER_ADDR', 'ADDRESS')}")
        words.append(f"--main_process_port {environment.get('MASTER_PORT', '29500')}")
    return " ".join([*words, f"--num_processes {processes} -m "])


def run_record(run: Path) -> dict[str, Any]:
    """``run.json`` of a run folder; empty where there is none, or something else."""
    try:
        record = read_json(run / "run.json") if (run / "run.json").is_file() else {}
    except UsageError:
        return {}
    return record if record.get("format") == "liftkit.run" else {}


def _step(row: str) -> float:
    try:
        return float(json.loads(row)["step"])
    except (ValueError, KeyError):  # a line that a killed run began
        return float("inf")
