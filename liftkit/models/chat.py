"""Chat templates of tokenizers are programs out of a file: transformers runs them in a sandbox, and here against the clock."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

from liftkit.errors import UsageError

SECONDS = 10.0
"""For one call; templates in use take some milliseconds."""


class _TooLongError(BaseException):
    """Put into a thread that takes too long; nothing between there and here catches it."""


def limit_template(tokenizer: Any, where: Path, seconds: float = SECONDS) -> None:
    """Let a tokenizer's chat template run for a limited time, and say on one line where it fails.

    Args:
        tokenizer: of transformers; others are left as they are.
        where: its folder.
        seconds: for one call.
    """
    apply = getattr(tokenizer, "apply_chat_template", None)
    if apply is not None:
        tokenizer.apply_chat_template = _limited(apply, where, seconds)


def _limited(apply: Callable[..., Any], where: Path, seconds: float) -> Callable[..., Any]:
    from jinja2 import TemplateError

    @wraps(apply)
    def limited(*given: Any, **named: Any) -> Any:
        try:
            with _time_limit(seconds):
                return apply(*given, **named)
        except _TooLongError:
            raise UsageError(
                f"{where}: its chat template runs for more than {seconds:g} s; fetch the tokenizer again"
            ) from None
        except (
            TemplateError,
            ValueError,
            TypeError,
            ArithmeticError,
            LookupError,
            AttributeError,
            RecursionError,
        ) as error:
            text = " ".join(str(error).split())[:300]
            raise UsageError(f"{where}: its chat template fails ({type(error).__name__}: {text})") from error
        except MemoryError as error:
            raise UsageError(f"{where}: its chat template makes more text than memory holds") from error

    return limited


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise :class:`_TooLongError` in this thread if the block takes longer."""
    caller, done, guard = threading.get_ident(), False, threading.Lock()

    def stop() -> None:
        with guard:
            if not done:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(caller), ctypes.py_object(_TooLongError))

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        with guard:
            done = True
