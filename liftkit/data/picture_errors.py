"""Why a picture cannot be used: a few reasons that a tally can count, made of whatever Pillow and its decoders raise."""

from __future__ import annotations

import errno
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

from liftkit.errors import LiftkitError

TOO_LARGE = "too large"
NO_MEMORY = "not enough memory"
NO_PERMISSION = "not readable (permission)"
TRUNCATED = "truncated"
DAMAGED = "damaged"
NO_PICTURE = "not a picture of a known format"
TOO_SMALL = "smaller than a patch"


class PictureError(LiftkitError):
    """A picture that cannot be used.

    Args:
        name: of the file.
        reason: a phrase that others share, for a :class:`~liftkit.tally.Tally`.
        detail: what is known beyond it.
    """

    def __init__(self, name: str, reason: str, detail: str = "") -> None:
        super().__init__(f"{name}: {reason}" + (f" ({detail})" if detail else ""))
        self.name, self.reason, self.detail = name, reason, detail


@contextmanager
def explained(name: str, unidentified: str = NO_PICTURE) -> Iterator[None]:
    """Turn whatever Pillow and its decoders raise on a file into a reason."""
    from PIL import UnidentifiedImageError

    try:
        yield
    except MemoryError as error:
        raise PictureError(name, NO_MEMORY) from error
    except UnidentifiedImageError as error:
        raise PictureError(name, unidentified) from error
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM):
            raise PictureError(name, NO_PERMISSION) from error
        raise PictureError(name, _reason(error), _detail(error)) from error
    except _decoder_errors() as error:
        raise PictureError(name, _reason(error), _detail(error)) from error


def _decoder_errors() -> tuple[type[Exception], ...]:
    """What decoders raise on files that are not what they should be."""
    from PIL.Image import DecompressionBombError

    return (
        *(ArithmeticError, AssertionError, AttributeError, BufferError, EOFError, LookupError, NameError, RuntimeError),
        *(SyntaxError, TypeError, ValueError, struct.error, zlib.error, DecompressionBombError),
    )


def _reason(error: Exception) -> str:
    text = str(error).lower()
    if "decompression bomb" in text:
        return TOO_LARGE
    ended = isinstance(error, EOFError) or "truncat" in text or "end of file" in text or "not enough" in text
    return TRUNCATED if ended else DAMAGED


def _detail(error: Exception) -> str:
    return " ".join(str(error).split())[:120]
