"""Ctrl-C in the middle of a run."""

from __future__ import annotations

import signal
from typing import Any


class Interrupt:
    """Ctrl-C once: finish the step, save and stop. Twice: at once."""

    heard = False

    def __enter__(self) -> Interrupt:
        try:
            self._before = signal.signal(signal.SIGINT, self._hear)
        except ValueError:  # not in the main thread: nobody can interrupt here
            self._before = None
        return self

    def _hear(self, *_: Any) -> None:
        if self.heard:
            raise KeyboardInterrupt
        self.heard = True

    def __exit__(self, *_: Any) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
