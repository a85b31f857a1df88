"""Where the captions of a folder's or a shard's pictures stand: in files beside them, or in lines of metadata."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import IO

from liftkit.checkpoint.text import stream_lines, text_of
from liftkit.data.captions import CAPTION_LIMIT, NOT_TAKEN, WITHOUT, caption_in, looks_like_captions, sidecars
from liftkit.data.metadata import Metadata, metadata_kind, read_metadata
from liftkit.tally import Tally


class CaptionFiles:
    """The captions of some pictures: of the file beside each, else of the innermost metadata that name it, else empty.

    Args:
        pictures: their plain names.
        others: plain names of the other files, in order.
        open_file: a file by its plain name.
        where: what to call a file in messages.
        label: what to call it in accounts.
        pairs: which file is beside which picture, and why others are left out; :func:`sidecars` of the names if None.
        reference_column: of metadata; see :class:`Metadata`.
        lines, files: accounts of lines of metadata and of caption files.

    Raises:
        UsageError: if metadata are broken.
    """

    def __init__(
        self,
        pictures: Sequence[str],
        others: Iterable[str],
        open_file: Callable[[str], AbstractContextManager[IO[bytes]]],
        where: Callable[[str], str],
        label: Callable[[str], str],
        lines: Tally,
        files: Tally,
        pairs: tuple[dict[str, str], dict[str, str]] | None = None,
        reference_column: str | None = None,
    ) -> None:
        self._open, self._where, self._label, self._files = open_file, where, label, files
        self._beside, left = pairs or sidecars(pictures, others)
        self._metadata = Metadata(pictures, lines, reference_column)
        used = set(self._beside.values())
        tables = [name for name in others if metadata_kind(name)]
        for name in sorted(tables, key=lambda name: (name.count("/"), name)):
            with open_file(name) as file:
                entries = read_metadata(metadata_kind(name) or "", stream_lines(file, where(name)), where(name))
                self._metadata.add(name.rpartition("/")[0], entries, label(name))
        files.use(len(used) + len(tables))
        used.update(tables)
        for name in others:
            if name not in used and looks_like_captions(name):
                files.leave_out(label(name), left.get(name, NOT_TAKEN))

    def references(self, picture: str) -> tuple[tuple[str, str | None, str], ...]:
        """See :meth:`Metadata.references`."""
        return self._metadata.references(picture)

    def of(self, picture: str) -> str:
        """The caption of a picture, empty where it has none.

        Raises:
            UsageError: if the file beside it cannot be read.
        """
        beside = self._beside.get(picture)
        if beside is not None:
            where = self._where(beside)
            with self._open(beside) as file:
                found = caption_in(text_of(file, where, CAPTION_LIMIT), where)
            if found is not None:
                if not found:
                    self._files.remark(self._label(beside), "empty")
                return found
            if self._label(beside) not in self._files.left_out.get(WITHOUT, {}):
                self._files.leave_out(self._label(beside), WITHOUT)
                self._files.use(-1)
        return self._metadata.of(picture)
