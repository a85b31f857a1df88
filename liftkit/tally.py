"""Accounts of what a reader found: found = used + left out, and what is left out has a name and a reason.

Every reader of something that a user gives (pictures, captions, lines of metadata, shards, prompts, keys of a LoRA) keeps
one :class:`Tally`. The command line prints its :meth:`Tally.summary`; ``--json`` and ``run.json`` hold its
:meth:`Tally.to_json`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

EXAMPLES = 3
"""How many names stand for all that share a reason."""


@dataclass
class Tally:
    """How many things of one kind were used, and which were left out and why.

    Args:
        what: the things counted, in the plural, such as ``images`` or ``keys``.
        used: how many are used.
        left_out: the names of those that are not, by reason; a reason completes "left out because it is ...", such as
            ``unreadable`` or ``smaller than a patch``.
        unnamed: how many more were left out, by reason, whose names are not kept.
        remarks: the names of those that are used and of which something has to be known, by remark; a remark completes
            "used are 2 ...", such as ``without a caption``.
    """

    what: str
    used: int = 0
    left_out: dict[str, dict[str, None]] = field(default_factory=dict)
    unnamed: dict[str, int] = field(default_factory=dict)
    remarks: dict[str, dict[str, None]] = field(default_factory=dict)

    def use(self, count: int = 1) -> None:
        """Count things that are used."""
        self.used += count

    def leave_out(self, name: str, reason: str) -> None:
        """Count one thing that is not used. A name counts once for a reason, however often it is met."""
        self.left_out.setdefault(reason, {})[name] = None

    def leave_out_more(self, reason: str, count: int) -> None:
        """Count things that are not used and too many to name; some of the same reason are named."""
        if count:
            self.unnamed[reason] = self.unnamed.get(reason, 0) + count

    def remark(self, name: str, text: str) -> None:
        """Name one thing that is used, for something that people have to know of it."""
        if text:
            self.remarks.setdefault(text, {})[name] = None

    @property
    def lost(self) -> int:
        """How many were left out."""
        return sum(self._count(reason) for reason in self.left_out)

    @property
    def found(self) -> int:
        """How many there were: used + left out."""
        return self.used + self.lost

    def summary(self, show: int = EXAMPLES) -> str:
        """What was left out, counted and with the first few names of each reason, and remarks; empty if there are none."""
        parts = []
        if self.left_out:
            parts.append(f"{self.used} of {self.found} {self.what} used; left out: {self.reasons(show)}")
        if self.remarks:
            named = "; ".join(
                f"{len(names)} {text} ({_some(names, len(names), show)})" for text, names in self.remarks.items()
            )
            parts.append(f"{self.what} used: {named}")
        return "; ".join(parts)

    def reasons(self, show: int = EXAMPLES) -> str:
        """What was left out, by reason, such as ``2 unreadable (a.png, b.png); 1 smaller than a patch (c.png)``."""
        counts = {reason: self._count(reason) for reason in self.left_out}
        return "; ".join(
            f"{counts[reason]} {reason} ({_some(names, counts[reason], show)})"
            for reason, names in self.left_out.items()
        )

    def to_json(self, show: int = EXAMPLES) -> dict[str, Any]:
        """Plain data: ``what``, ``found``, ``used``, ``left_out`` with ``reason``, ``count`` and ``examples``, and
        ``remarks`` with ``remark``, ``count`` and ``examples``."""
        left_out = [
            {"reason": reason, "count": self._count(reason), "examples": list(names)[:show]}
            for reason, names in self.left_out.items()
        ]
        remarks = [
            {"remark": text, "count": len(names), "examples": list(names)[:show]}
            for text, names in self.remarks.items()
        ]
        return {"what": self.what, "found": self.found, "used": self.used, "left_out": left_out, "remarks": remarks}

    def _count(self, reason: str) -> int:
        return len(self.left_out[reason]) + self.unnamed.get(reason, 0)

    def __add__(self, other: Tally) -> Tally:
        """The account of two readers of the same kind of thing together."""
        total = Tally(self.what, self.used + other.used)
        for each in (self, other):
            for reason, names in each.left_out.items():
                total.left_out.setdefault(reason, {}).update(names)
                total.leave_out_more(reason, each.unnamed.get(reason, 0))
            for text, names in each.remarks.items():
                total.remarks.setdefault(text, {}).update(names)
        return total


def combined(tallies: Iterable[Tally]) -> list[Tally]:
    """Accounts of several readers, those of the same things added; without those that found nothing."""
    found: dict[str, Tally] = {}
    for tally in tallies:
        found[tally.what] = found[tally.what] + tally if tally.what in found else tally
    return [tally for tally in found.values() if tally.found]


def _some(names: dict[str, None], count: int, show: int) -> str:
    """The first few names, on one line, and how many more there are."""
    first = ", ".join(name.replace("\n", "\\n") for name in list(names)[:show])
    return first + (f" and {count - min(show, len(names))} more" if count > show else "")
