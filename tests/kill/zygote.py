"""A process with everything imported that forks for each command and may kill it at its n-th file event.

File events are what an audit hook sees: files opened for writing, renamed and removed, folders made and removed. The hook is
called before the event, so that a process killed at event n has done n - 1 of them. Requests and answers are lines of JSON.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass
class Ran:
    """How a command ended.

    Args:
        code: its exit code, negative for a signal.
        events: file events that it came to.
        output: stdout and stderr.
    """

    code: int
    events: int
    output: str


class Zygote:
    """Starts the process, and asks it to run commands; use as a context."""

    def __enter__(self) -> Zygote:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "TERM": "dumb",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.kill.zygote"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=Path(__file__).parents[2],
        )
        return self

    def run(self, arguments: list[str], folder: Path, kill: int = 0) -> Ran:
        """Run ``liftkit`` in a folder.

        Args:
            arguments: of the command line.
            folder: where it runs; events elsewhere do not count.
            kill: at which event, from 1; 0 lets it end.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([arguments, str(folder), kill]) + "\n")
        self._process.stdin.flush()
        return Ran(**json.loads(self._process.stdout.readline()))

    def __exit__(self, *_: Any) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def main() -> None:
    """Answer requests until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _load()
    for line in sys.stdin:
        arguments, folder, kill = json.loads(line)
        answers.write(json.dumps(_fork(arguments, folder, kill)) + "\n")
        answers.flush()


def _load(names: tuple[str, ...] = ("torch", "diffusers", "liftkit.cli.app")) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            with suppress(Exception):
                importlib.import_module(name)


def _fork(arguments: list[str], folder: str, kill: int) -> dict[str, Any]:
    reader, writer = os.pipe()
    printed = os.memfd_create("output")
    process = os.fork()
    if process == 0:
        os.close(reader)
        for stream in (1, 2):
            os.dup2(printed, stream)
        _child(arguments, folder, kill, writer)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        lines = pipe.read().splitlines()
    _, status = os.waitpid(process, 0)
    # What this command imported is there when the next one begins.
    _load(tuple(name for line in lines[1:] for name in json.loads(line)))
    with os.fdopen(printed, "rb") as file:
        file.seek(0)
        output = file.read().decode(errors="replace")
    return {
        "code": os.waitstatus_to_exitcode(status),
        "events": int(lines[0]) if lines else kill,
        "output": output,
    }


def _child(arguments: list[str], folder: str, kill: int, writer: int) -> None:
    os.chdir(folder)
    known, count = set(sys.modules), 0

    def watch(event: str, details: tuple[Any, ...]) -> None:
        nonlocal count
        if event == "open":
            path, _, flags = details
            if not isinstance(path, str | bytes | os.PathLike) or not flags & WRITES:
                return
            if not os.path.abspath(os.fsdecode(path)).startswith(folder):
                return
        elif event not in CHANGES:
            return
        count += 1
        if count == kill:
            os.kill(os.getpid(), signal.SIGKILL)

    from liftkit.cli import app

    sys.argv = ["liftkit", *arguments]
    sys.addaudithook(watch)
    code = 1
    try:
        app.run()
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    finally:
        counted = count
        sys.stdout.flush()
        sys.stderr.flush()
        os.write(writer, f"{counted}\n{json.dumps(sorted(set(sys.modules) - known))}".encode())
        os._exit(code)


if __name__ == "__main__":
    main()
