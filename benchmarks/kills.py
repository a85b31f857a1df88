"""Kills of every command, spread over its file events: ``python -m benchmarks.kills [KILLS]``; prints a table.

See :mod:`tests.kill`: each kill is followed by a look at what it left, and by the next command, which has to lead out.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from pathlib import Path

from tests.kill.commands import commands, killed, prepare, reference
from tests.kill.zygote import Zygote

STATES = ("absent", "begun", "old", "complete", "mixture")


def main(kills: int = 500) -> None:
    """Kill, and print a row for each command."""
    with tempfile.TemporaryDirectory() as scratch, Zygote() as zygote:
        root = Path(scratch).resolve()
        stock = root / "stock"
        stock.mkdir()
        prepare(zygote, stock)
        every = commands(stock)
        print(f"| command | file events | kills | {' | '.join(STATES)} | dead ends | other faults |")
        print(f"|---{'|---:' * (len(STATES) + 4)}|")
        for number, command in enumerate(every):
            share = kills // len(every) + (number < kills % len(every))
            expected = reference(zygote, command, stock, root / "work")
            seen: Counter[str] = Counter()
            dead = faults = 0
            for turn in range(share):
                event = 1 + turn * expected.events // share
                outcome = killed(zygote, command, stock, root / "work", expected, event)
                seen[outcome.state] += 1
                dead += outcome.dead_end
                faults += outcome.fault is not None and not outcome.dead_end
                if outcome.fault is not None:
                    print(f"{command.name}, event {event}: {outcome.fault}", file=sys.stderr, flush=True)
            cells = " | ".join(str(seen[state]) for state in STATES)
            print(f"| {command.name} | {expected.events} | {share} | {cells} | {dead} | {faults} |", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
