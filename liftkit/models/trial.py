"""Whether a folder would load, found out beside other work."""

from __future__ import annotations

import sys
from collections.abc import Callable

from liftkit.checkpoint.model import ModelFolder
from liftkit.errors import LiftkitError
from liftkit.models.builder import Builder, cannot_load


class Trial:
    """Tries folders, in another process where the libraries are not in this one's memory yet.

    That begins with the first folder and is light. As soon as it finds anything amiss, one with the whole libraries takes its
    place, whose word counts."""

    def __init__(self) -> None:
        self._builder: Builder | None = None

    def begin(self, folder: ModelFolder) -> Callable[[], list[str]]:
        """Begin with a folder, when the one before is done.

        Returns:
            A function that waits, and says what :func:`cannot_load` does.

        Raises:
            UsageError: now or by that function; see :func:`cannot_load`.
            LiftkitError: by that function, if the other process was killed.
        """
        if self._builder is None and "diffusers" in sys.modules:
            lacks = cannot_load(folder)
            return lambda: lacks
        asked = self._builder = self._builder or Builder(light=True)
        asked.ask(folder)
        return _once(lambda: self._answer(folder, asked))

    def end(self) -> None:
        """Let go of the other process; it goes with this object at the latest."""
        if self._builder is not None:
            self._builder.end()
        self._builder = None

    def _answer(self, folder: ModelFolder, asked: Builder) -> list[str]:
        if asked.light:
            try:
                lacks = asked.answer(folder) if asked is self._builder else ["an answer, for it has ended"]
            except LiftkitError as error:
                lacks = [str(error)]
            if not lacks:
                return lacks
            if self._builder is None or self._builder.light:
                self.end()
                self._builder = Builder(light=False)
            asked = self._builder
            asked.ask(folder)
        return asked.answer(folder)


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
