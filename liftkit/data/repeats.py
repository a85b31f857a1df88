"""Folders as kohya's trainers have them: of ``10_red cup``, images are seen ten times while those of ``1_cup`` are seen once, and
``red cup`` is the caption of those that have none."""

from __future__ import annotations

import re

from liftkit.data.captioned import CaptionedFolder
from liftkit.data.heldout import Part, Weighted
from liftkit.errors import UsageError
from liftkit.tally import Tally

_REPEATS = re.compile(r"([0-9]{1,6})(?:_(.*))?", re.DOTALL)
_PLAIN = re.compile(r"[1-9][0-9]{0,2}_.+", re.DOTALL)
ELSEWHERE = "in no folder that begins with its number of repeats, as 10_name"
NEVER = "in a folder of 0 repeats"


class Concept(Part):
    """The images of one such folder.

    Args:
        source: the folder above.
        name: of the folder.
        indices: of its images within ``source``.
        text: the caption of those without one.
    """

    def __init__(self, source: CaptionedFolder, name: str, indices: list[int], text: str) -> None:
        super().__init__(source, indices)
        self.name, self.text, self.by_folder = f"{source.name}/{name}", text, source.by_folder

    def caption(self, index: int) -> str:
        """See :class:`CaptionedSource`."""
        return self.text if self.by_folder else super().caption(index) or self.text


def concepts(folder: CaptionedFolder) -> Weighted:
    """The folders of repeats within a folder, each with how many images an epoch has of it: its own, as often as they repeat.

    Images elsewhere are counted as left out, by the folder's account, which the first of the parts has.

    Raises:
        UsageError: if there is none.
    """
    found: dict[str, list[int]] = {}
    for index in range(len(folder)):
        name = folder.label(index)
        top, slash, _ = name.partition("/")
        match = _REPEATS.fullmatch(top) if slash else None
        if match is None or not int(match[1]):
            folder.tally.leave_out(name, NEVER if match else ELSEWHERE)
        else:
            found.setdefault(top, []).append(index)
    if not found:
        raise UsageError(
            f"{folder.path}: repeats: no image is in a folder right below it that begins with a number, as 10_name; name them so, "
            f"or leave repeats out (left out: {folder.tally.reasons()})"
        )
    parts: Weighted = []
    for top, indices in found.items():
        times, text = _REPEATS.fullmatch(top).groups()  # type: ignore[union-attr]
        part = Concept(folder, top, indices, (text or "").strip())
        if parts:
            part.tally, part.texts = Tally("images"), []
        parts.append((part, float(int(times) * len(indices))))
    return parts


def looks_repeated(folder: CaptionedFolder) -> str:
    """A folder of repeats within a folder that has its images in such folders alone; empty if it does not."""
    tops = {(top, slash) for top, slash, _ in (folder.label(index).partition("/") for index in range(len(folder)))}
    return min(tops)[0] if all(slash and _PLAIN.fullmatch(top) for top, slash in tops) else ""
