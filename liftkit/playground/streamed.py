"""Work that reports by calling back, as an iterator of what it reports."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any

from liftkit.playground.run import Cancelled

_END = object()


def streamed(work: Callable[[Callable[..., None]], Iterable[Any]], stop: Event) -> Iterator[Any]:
    """Run work in a thread of its own, and give what it makes and what it reports, in order.

    Where nobody iterates any more, the work ends at its next report; it has ended when this returns.

    Args:
        work: called with a function for its reports, whose arguments come as a tuple.
        stop: ends the work too, once it is set.

    Raises:
        Cancelled: if it was stopped.
        Exception: what the work raises.
    """
    found: queue.Queue[Any] = queue.Queue()

    def report(*values: Any) -> None:
        if stop.is_set():
            raise Cancelled
        found.put(values)

    def run() -> None:
        for each in work(report):
            found.put(each)

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run)
        running.add_done_callback(lambda _: found.put(_END))
        try:
            while (item := found.get()) is not _END:
                yield item
            running.result()
        finally:
            stop.set()
