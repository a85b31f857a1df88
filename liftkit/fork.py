"""A copy of this process that works beside it."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from typing import IO, NoReturn

from liftkit.interrupt import ENDING


def may_fork() -> bool:
    """True where a copy finds no lock held by a thread that it has not: on Linux, as long as Python has no second one.

    Those of the numeric libraries wait while nothing is computed, and they see to it themselves that they can be copied.
    """
    return sys.platform == "linux" and threading.active_count() == 1


class Fork:
    """A copy of this process that reads and writes lines, as far as it takes with the names of :class:`subprocess.Popen`.

    Args:
        work: called in the copy with the lines that are written to ``stdin``, and the file that ``stdout`` reads.
        errors: the file that what it prints goes to.

    Raises:
        OSError: if the machine has no room for one more process.
    """

    def __init__(self, work: Callable[[IO[str], IO[str]], object], errors: IO[str]) -> None:
        (questions, ours), (theirs, answers) = os.pipe(), os.pipe()
        self.returncode: int | None = None
        # What a signal raises is for this process alone: the copy gets none before it has handlers of its own.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
        try:
            with warnings.catch_warnings():
                # Newer Pythons warn of any thread; see may_fork.
                warnings.simplefilter("ignore", DeprecationWarning)
                self.pid = os.fork()
        except OSError:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            for handle in (questions, ours, theirs, answers):
                os.close(handle)
            raise
        if self.pid == 0:
            _run(work, questions, answers, before, errors)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        os.close(questions)
        os.close(answers)
        self.stdin, self.stdout = os.fdopen(ours, "w"), os.fdopen(theirs)

    def speaks(self, seconds: float) -> bool:
        """Wait, for so long at most, for a line that was not read, or its end; whether there is one."""
        # Not select, which knows no file whose number is above 1023.
        waiting = select.poll()
        waiting.register(self.stdout, select.POLLIN)
        return bool(waiting.poll(1000 * seconds))

    def kill(self) -> None:
        """End it now."""
        if self.returncode is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        """Wait for its end.

        Returns:
            Its exit code, or the negative number of the signal that ended it; 0 if that is not known, for somebody else waited.
        """
        if self.returncode is None:
            try:
                self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            except ChildProcessError:  # The kernel, where SIGCHLD is ignored, as some that start programs leave it.
                self.returncode = 0
        return self.returncode


def _run(
    work: Callable[[IO[str], IO[str]], object], questions: int, answers: int, mask: Iterable[int], errors: IO[str]
) -> NoReturn:
    """The copy: it ends here, whatever happens, for all that is below on the stack is the work of the other."""
    code = 1
    try:
        for number in ENDING:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        _let_go({questions, answers, errors.fileno()})
        for output in (1, 2):
            os.dup2(errors.fileno(), output)
        sys.stdout = sys.stderr = errors  # type: ignore[assignment]
        work(os.fdopen(questions), os.fdopen(answers, "w"))
        code = 0
    finally:
        if code:
            traceback.print_exc(file=errors)
            errors.flush()
        os._exit(code)


def _let_go(kept: Collection[int]) -> None:
    """Let go of all that this process has open but some, above all of locks, which would outlive the other in the copy.

    The numbers stay taken, so that whatever still writes to one of them writes to nothing, and not to another file.
    """
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in map(int, os.listdir("/proc/self/fd")):
        if number not in (nothing, *kept):
            os.dup2(nothing, number, inheritable=False)
