"""Whether a folder would load: everything is built, and no weight is read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import IO, Any

from liftkit.checkpoint.components import LATENT_VAE, read_components
from liftkit.checkpoint.model import ModelFolder, find_model
from liftkit.errors import LiftkitError, UsageError
from liftkit.models.load import MissingPackageError, load_component, load_pipeline


def cannot_load(folder: ModelFolder) -> list[str]:
    """Build everything that a folder holds, without reading its weights, to find out what would not load.

    Returns:
        What this machine lacks to load it, each on one line; nothing if all is well.

    Raises:
        UsageError: naming the component that is incomplete, or that its library cannot load.
    """
    quantized = tuple(part.name for part in read_components(folder) if part.quantized)
    try:
        load_pipeline(folder, device="meta", without=quantized)
        if (folder.path / LATENT_VAE).is_dir():
            load_component(folder, LATENT_VAE, device="meta")
    except MissingPackageError as error:
        return [f"it cannot be sampled or finetuned on this machine: {error}"]
    return []


class Trial:
    """Tries folders, in another process where the libraries are not in this one's memory yet, for they take more of it than a
    conversion does. That process imports them as soon as there is a trial, and once for all folders; it ends with the trial."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self.end: Callable[[], object] = lambda: None
        """Let go of the other process; it goes with this object at the latest."""
        if "diffusers" not in sys.modules:
            self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "liftkit.models.trial"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
            )
            self.end = weakref.finalize(self, _end, self._process, self._errors)

    def begin(self, folder: ModelFolder) -> Callable[[], list[str]]:
        """Begin with a folder, when the one before is done.

        Returns:
            A function that waits, and says what :func:`cannot_load` does.

        Raises:
            UsageError: now or by that function; see :func:`cannot_load`.
            LiftkitError: by that function, if the other process was killed.
        """
        if self._process is None:
            lacks = cannot_load(folder)
            return lambda: lacks
        assert self._process.stdin is not None
        # Of a process that is no more, the answer is missing as well, and says so.
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps([str(folder.path.absolute()), folder.source]) + "\n")
            self._process.stdin.flush()
        return _once(lambda: self._answer(folder))

    def _answer(self, folder: ModelFolder) -> list[str]:
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.endswith("\n"):
            code = self._process.wait()
            self._errors.seek(0)
            last = (self._errors.read().strip().splitlines() or ["no word"])[-1]
            raise LiftkitError(f"{folder.source}: the process that tries to load it ended with {code} ({last})")
        answer = json.loads(line)
        if "error" in answer:
            raise UsageError(answer["error"])
        return list(answer["lacks"])


def _once(read: Callable[[], list[str]]) -> Callable[[], list[str]]:
    """The same answer, or the same error, however often it is asked for."""
    found: list[list[str] | LiftkitError] = []

    def answer() -> list[str]:
        if not found:
            try:
                found.append(read())
            except LiftkitError as error:
                found.append(error)
        if isinstance(found[0], LiftkitError):
            raise found[0]
        return found[0]

    return answer


def _end(process: subprocess.Popen[str], errors: IO[str]) -> None:
    process.kill()
    process.communicate()
    errors.close()


def _main() -> None:
    """The other process: a line of JSON for each line of JSON. What libraries print goes with the errors."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import diffusers  # noqa: F401

    for line in sys.stdin:
        path, source = json.loads(line)
        try:
            answer: dict[str, Any] = {"lacks": cannot_load(replace(find_model(path), source=source))}
        except UsageError as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    _main()
