"""Builds everything that a folder holds, without its weights, to find out what would not load; in another process where asked."""

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

import torch

from liftkit.checkpoint.components import LATENT_VAE, read_components
from liftkit.checkpoint.model import ModelFolder, find_model
from liftkit.errors import LiftkitError, UsageError
from liftkit.fork import Fork, may_fork
from liftkit.models.light import import_light
from liftkit.models.load import MissingPackageError, load_component, load_pipeline

LIGHT = "light"
ADAPTER = "adapter_config.json"
"""Beside a component's weights: transformers then loads that adapter too, with peft alone."""
PATIENCE = 60.0
"""Seconds for what a forked process does in two: should it wait for a lock that nobody will open, it is given up."""


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


class Builder:
    """Another process that does what :func:`cannot_load` does, for the libraries take more memory than a conversion.

    Args:
        light: with the libraries as :func:`liftkit.models.light.import_light` has them. What it does not find to be well, one
            that is not light may. Where this process can be copied, it is a copy, for which torch is there already.
    """

    def __init__(self, *, light: bool) -> None:
        self.light = light
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self._process = _copy(self._errors) if light else _start(light, self._errors)
        self.end: Callable[[], object] = weakref.finalize(self, _end, self._process, self._errors)
        """Let go of the process; it goes with this object at the latest."""

    def ask(self, folder: ModelFolder) -> None:
        """Begin with a folder, when the one before is done."""
        assert self._process.stdin is not None
        # Of a process that is no more, the answer is missing as well, and says so.
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps([str(folder.path.absolute()), folder.source]) + "\n")
            self._process.stdin.flush()

    def answer(self, folder: ModelFolder) -> list[str]:
        """Wait until it is done with the folder that it was asked for first, and return what :func:`cannot_load` does.

        Raises:
            UsageError: what that raises.
            LiftkitError: if the process has ended.
        """
        assert self._process.stdout is not None
        if isinstance(self._process, Fork) and not self._process.speaks(PATIENCE):
            self._process.kill()
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


def _copy(errors: IO[str]) -> Fork | subprocess.Popen[str]:
    """A light process: a copy of this one where that can be, and where it holds no device, which a copy may not use."""
    with suppress(OSError):
        if may_fork() and not torch.cuda.is_initialized():
            return Fork(_light, errors)
    return _start(True, errors)


def _start(light: bool, errors: IO[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-P", "-m", "liftkit.models.builder", *([LIGHT] if light else [])]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True)


def _end(process: Fork | subprocess.Popen[str], errors: IO[str]) -> None:
    process.kill()
    process.wait()
    for file in (process.stdin, process.stdout, errors):
        assert file is not None
        # What nobody will read any more.
        with suppress(BrokenPipeError):
            file.close()


def _light(questions: IO[str], answers: IO[str]) -> None:
    _serve(questions, answers, light=True)


def _serve(questions: IO[str], answers: IO[str], *, light: bool) -> None:
    """The other process: a line of JSON for each line of JSON."""
    imported = not light
    for line in questions:
        path, source = json.loads(line)
        try:
            folder = replace(find_model(path), source=source)
            if light and any(folder.path.glob(f"*/{ADAPTER}")):
                raise UsageError(f"{source}: holds an adapter, which is looked at where peft is")
            if not imported:
                import_light(transformers=any(folder.index[name][0] != "diffusers" for name in folder.components))
            imported = True
            answer: dict[str, Any] = {"lacks": cannot_load(folder)}
        except UsageError as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), file=answers, flush=True)


def _main() -> None:
    """What libraries print goes with the errors."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _serve(sys.stdin, answers, light=LIGHT in sys.argv)


if __name__ == "__main__":
    _main()
