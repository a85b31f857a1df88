"""Webdataset shards: tar files whose members ``key.jpg`` and ``key.txt`` or ``key.json`` make one captioned image.

Training wants images at random access and in an order of its own, so the shards are indexed once by their
headers, and each picture is then read from its place in the file. The ``webdataset`` package streams instead.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path, PurePosixPath
from typing import IO, Any

from liftkit.checkpoint.files import expanded, reason
from liftkit.checkpoint.source import open_regular
from liftkit.data.braces import expand_braces
from liftkit.data.caption_files import CaptionFiles
from liftkit.data.captions import looks_like_captions, plain_name, sidecars
from liftkit.data.picture_errors import PictureError
from liftkit.data.picture_files import HIDDEN, is_hidden, picture_ending
from liftkit.data.picture_kinds import ENDINGS, HEAD, NOT_READ, TEXTS, format_of
from liftkit.data.source import EncodedSource, file_stamp
from liftkit.errors import UsageError
from liftkit.tally import Tally

HEADER_LIMIT = 16 * 1024 * 1024
"""Bytes of a member's header at most."""
_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
LINKS = "links or devices"
_ZEROS = 1 << 20
Place = tuple[int, int]
"""Start and size of a member in its tar file."""


@dataclass
class _Shard:
    """One tar file.

    Args:
        path: of the file.
        pictures, others: places by plain name, in the order of the file.
        links: names of members that are no regular files, without pictures.
    """

    path: Path
    pictures: dict[str, Place] = field(default_factory=dict)
    others: dict[str, Place] = field(default_factory=dict)
    links: list[str] = field(default_factory=list)

    def label(self, name: str) -> str:
        """What to call a member in messages."""
        return f"{self.path.name}:{name}"


class WebDataset(EncodedSource):
    """Captioned images in local, uncompressed tar files.

    A member is a picture if its name ends as one. A caption is in the member of the same name with the ending ``txt``,
    ``caption`` or ``json``, or in a ``metadata.jsonl`` or ``metadata.csv`` in the shard. Of names with several dots the key
    is all up to the last, unless a picture with a shorter key is there: then ``0001.seg.png`` is a part of the sample
    ``0001`` and no picture of its own, as webdataset has it.

    Args:
        urls: paths; braces, as in ``shards/{000..127}.tar``, and ``*`` are expanded.

    Raises:
        UsageError: if a shard is missing or no whole tar file, or none holds an image.
    """

    def __init__(self, urls: str | Path | Sequence[str | Path]) -> None:
        given = [urls] if isinstance(urls, (str, Path)) else list(urls)
        self.tars = [path for url in given for path in _find(str(url))]
        self.name = Path(str(given[0])).name
        self.tally = Tally("images")
        lines, files = Tally("lines of metadata"), Tally("caption files")
        self.samples: list[tuple[_Shard, str]] = []
        self._captions: dict[Path, CaptionFiles] = {}
        for tar in self.tars:
            shard = _index(tar, self.tally)
            self._captions[tar] = _captions(shard, lines, files)
            self.samples += [(shard, name) for name in shard.pictures]
        self.texts = [lines, files]
        if not self.samples:
            why = f"; left out: {self.tally.reasons()}" if self.tally.lost else ""
            raise UsageError(f"{', '.join(map(str, given))}: no image in these shards{why}")

    def __len__(self) -> int:
        return len(self.samples)

    def label(self, index: int) -> str:
        """See :class:`CaptionedSource`: the shard and the member."""
        shard, name = self.samples[index]
        return shard.label(name)

    def stamp(self, index: int) -> str:
        """See :class:`CaptionedSource`."""
        shard, name = self.samples[index]
        return f"{file_stamp(shard.path, self.label(index))}|{name}|{shard.pictures[name][0]}"

    @contextmanager
    def open(self, index: int) -> Iterator[IO[bytes]]:
        """See :class:`EncodedSource`."""
        shard, name = self.samples[index]
        try:
            with _member(shard.path, shard.pictures[name]) as file:
                yield file
        except UsageError as error:
            raise PictureError(self.label(index), "not readable", str(error)) from error

    def caption(self, index: int) -> str:
        """See :class:`CaptionedSource`: ``key.txt``, else ``text``, ``caption`` or ``prompt`` in ``key.json``."""
        shard, name = self.samples[index]
        return self._captions[shard.path].of(name)

    def describe(self) -> dict[str, Any]:
        """See :class:`CaptionedSource`."""
        return {"source": "webdataset", "name": self.name, "images": len(self), "shards": len(self.tars)}


def _find(url: str) -> list[Path]:
    if "://" in url or url.startswith("pipe:"):
        raise UsageError(f"{url}: shards are read at random access, so they must be local; fetch them first")
    paths: list[Path] = []
    for name in expand_braces(str(expanded(url))):
        found = sorted(glob(name)) if not Path(name).is_file() else [name]
        if not found:
            raise UsageError(f"{name}: no such shard; check the path and its braces")
        paths += map(Path, found)
    return paths


class _Part(io.RawIOBase):
    """A part of an open file. No more is read at once than there is, and than ``most``, whatever number a header names."""

    def __init__(self, file: IO[bytes], start: int, size: int, most: int = 1 << 30) -> None:
        self._handle, self._start, self._size, self._most, self._at = file.fileno(), start, size, most, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(0, offset + (0, self._at, self._size)[whence])
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._size - self._at)
        wanted = left if size is None or size < 0 else min(size, left)
        content = os.pread(self._handle, min(wanted, self._most), self._start + self._at)
        self._at += len(content)
        return content


@contextmanager
def _member(tar: Path, place: Place) -> Iterator[IO[bytes]]:
    with open_regular(tar) as file:
        yield _Part(file, *place)  # type: ignore[misc]


def _index(tar: Path, tally: Tally) -> _Shard:
    """The members of a shard that are used, and an account of the pictures that are not."""
    shard = _Shard(tar)
    try:
        with open_regular(tar) as raw:
            packed = next(
                (name for head, name in _PACKED.items() if os.pread(raw.fileno(), 6, 0).startswith(head)), None
            )
            if packed is not None:
                raise UsageError(
                    f"{tar}: compressed ({packed}), and shards are read at random access; unpack it: {packed} -d < IN > OUT.tar"
                )
            whole = _Part(raw, 0, os.fstat(raw.fileno()).st_size, HEADER_LIMIT)
            start: int | None = 0
            while start is not None:
                whole.seek(start)
                with tarfile.open(fileobj=whole, mode="r:") as file:  # type: ignore[call-overload]
                    for member in file:
                        _take(member, raw, shard, tally)
                        file.members = []  # type: ignore[attr-defined]  # else it keeps them all
                    start = _after_end(whole, file.offset)
    except (OSError, tarfile.TarError, ValueError, OverflowError, MemoryError, EOFError, RecursionError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{tar}: no whole tar file ({reason(error)}); fetch it again") from error
    for name in _parts_of_samples(shard):
        tally.leave_out(shard.label(name), "further pictures of a sample")
        del shard.pictures[name]
    return shard


def _after_end(whole: _Part, end: int) -> int | None:
    """Where another archive begins behind one that ended, as ``cat a.tar b.tar`` leaves it; None if nothing follows.

    Args:
        whole: the file.
        end: where its members ended.

    Raises:
        tarfile.ReadError: if there is no mark of an end, which tarfile takes for one.
    """
    whole.seek(end)
    first = whole.read(tarfile.BLOCKSIZE)
    if any(first):
        raise tarfile.ReadError(f"no header of a member at byte {end}")
    at = end
    while chunk := whole.read(_ZEROS):
        rest = chunk.lstrip(b"\0")
        if rest:
            return at + tarfile.BLOCKSIZE + (len(chunk) - len(rest)) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
        at += len(chunk)
    return None


def _take(member: tarfile.TarInfo, raw: IO[bytes], shard: _Shard, tally: Tally) -> None:
    """Sort one member in."""
    name = plain_name(member.name)
    parts = PurePosixPath(name).parts
    ending = picture_ending(name.rpartition("/")[2])
    is_picture = ending in ENDINGS
    if any(is_hidden(part) for part in parts):
        if is_picture:
            tally.leave_out(shard.label(name), HIDDEN)
    elif ending in NOT_READ:
        tally.leave_out(shard.label(name), NOT_READ[ending])
    elif not member.isfile():
        if is_picture and not member.isdir():
            tally.leave_out(shard.label(name), LINKS)
        elif not member.isdir():
            shard.links.append(name)
    elif member.sparse is not None:
        tally.leave_out(shard.label(name), "sparse files: pack them without holes")
    elif member.offset_data < 0 or member.size < 0:
        raise ValueError(f"{name} has no place")
    else:
        place = member.offset_data, member.size
        if ending not in ENDINGS | TEXTS:
            is_picture = format_of(_Part(raw, *place).read(HEAD)) is not None
        places = shard.pictures if is_picture else shard.others
        if is_picture and name in places:
            tally.leave_out(shard.label(name), "packed twice; the later one is taken")
        places[name] = place


def _parts_of_samples(shard: _Shard) -> list[str]:
    """Pictures with several dots in their names that belong to the sample of another picture: ``0001.seg.png`` beside
    ``0001.jpg``, where no ``0001.seg.txt`` makes it a sample of its own."""
    keys = {name.rpartition(".")[0] for name in shard.pictures}
    beside, _ = sidecars(shard.pictures, shard.others)
    found = []
    for name in shard.pictures:
        folder, slash, base = name.rpartition("/")
        short = f"{folder}{slash}{base.partition('.')[0]}"
        if base.count(".") > 1 and short in keys and name not in beside:
            found.append(name)
    return found


def _captions(shard: _Shard, lines: Tally, files: Tally) -> CaptionFiles:
    """The captions of a shard's pictures."""
    beside, left = sidecars(shard.pictures, shard.others)
    short: dict[str, list[str]] = {}
    for name in shard.pictures:
        folder, slash, base = name.rpartition("/")
        short.setdefault(f"{folder}{slash}{base.partition('.')[0]}", []).append(name)
    for text in list(left):
        # webdataset's own key, all up to the first dot: 0001.txt for 0001.image.jpg.
        pictures = short.get(text.rpartition(".")[0], [])
        if len(pictures) == 1 and pictures[0] not in beside:
            beside[pictures[0]] = text
            del left[text]
    found = CaptionFiles(
        list(shard.pictures),
        shard.others,
        lambda name: _member(shard.path, shard.others[name]),
        lambda name: f"{shard.path}: {name}",
        shard.label,
        lines,
        files,
        (beside, left),
    )
    for name in filter(looks_like_captions, shard.links):
        files.leave_out(shard.label(name), LINKS)
    return found
