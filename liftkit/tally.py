"""Accounts of what a reader found: found = used + left out, and what is left out has a name and a reason.

Every reader of something that a user gives (pictures, captions, lines of metadata, shards, prompts, keys of a LoRA) keeps
one :class:`Tally`. The command line prints its :meth:`Tally.summary`; ``--json`` and ``run.json`` hold its
:meth:`Tally.to_json`.
"""

from __future__ import annotations

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
    """

    what: str
    used: int = 0
    left_out: dict[str, dict[str, None]] = field(default_factory=dict)

    def use(self, count: int = 1) -> None:
        """Count things that are used."""
        self.used += count

    def leave_out(self, name: str, reason: str) -> None:
        """Count one thing that is not used. A name counts once for a reason, however often it is met."""
        self.left_out.setdefault(reason, {})[name] = None

    @property
    def lost(self) -> int:
        """How many were left out."""
        return sum(len(names) for names in self.left_out.values())

    @property
    def found(self) -> int:
        """How many there were: used + left out."""
        return self.used + self.lost

    def summary(self, show: int = EXAMPLES) -> str:
        """One line that counts what was left out and names the first few of each reason; empty if all are used."""
        if not self.left_out:
            return ""
        return f"{self.used} of {self.found} {self.what} used; left out: {self.reasons(show)}"

    def reasons(self, show: int = EXAMPLES) -> str:
        """What was left out, by reason, such as ``2 unreadable (a.png, b.png); 1 smaller than a patch (c.png)``."""
        parts = []
        for reason, names in self.left_out.items():
            more = f" and {len(names) - show} more" if len(names) > show else ""
            parts.append(f"{len(names)} {reason} ({', '.join(list(names)[:show])}{more})")
        return "; ".join(parts)

    def to_json(self, show: int = EXAMPLES) -> dict[str, Any]:
        """Plain data: ``what``, ``found``, ``used``, and ``left_out`` with ``reason``, ``count`` and ``examples``."""
        left_out = [
            {"reason": reason, "count": len(names), "examples": list(names)[:show]}
            for reason, names in self.left_out.items()
        ]
        return {"what": self.what, "found": self.found, "used": self.used, "left_out": left_out}

    def __add__(self, other: Tally) -> Tally:
        """The account of two readers of the same kind of thing together."""
        total = Tally(
            self.what, self.used + other.used, {reason: dict(names) for reason, names in self.left_out.items()}
        )
        for reason, names in other.left_out.items():
            total.left_out.setdefault(reason, {}).update(names)
        return total
