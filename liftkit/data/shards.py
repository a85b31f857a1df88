"""Webdataset shards: tar files whose members ``key.jpg`` and ``key.txt`` or ``key.json`` make one captioned image.

Training wants images at random access and in an order of its own, so the shards are indexed once by their
headers, and each picture is then read from its place in the file. The ``webdataset`` package streams instead.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path, PurePosixPath
from typing import Any

from liftkit.checkpoint.files import reason
from liftkit.data.images import picture_endings
from liftkit.data.source import EncodedSource, caption_of, decoded_text, file_stamp
from liftkit.errors import UsageError


@dataclass
class _Sample:
    """Where the parts of one key are: start and size in their tar file, by ending."""

    tar: Path
    key: str
    parts: dict[str, tuple[int, int]] = field(default_factory=dict)
    picture: str | None = None


class WebDataset(EncodedSource):
    """Captioned images in local, uncompressed tar files.

    Args:
        urls: paths; braces, as in ``shards/{000..127}.tar``, and ``*`` are expanded.

    Raises:
        UsageError: if a shard is missing or no tar file, or none holds an image.
    """

    def __init__(self, urls: str | Path | Sequence[str | Path]) -> None:
        given = [urls] if isinstance(urls, (str, Path)) else list(urls)
        self.tars = [path for url in given for path in _find(str(url))]
        endings = picture_endings()
        self.samples = [sample for tar in self.tars for sample in _index(tar, endings) if sample.picture]
        if not self.samples:
            raise UsageError(f"{', '.join(map(str, given))}: no image in these shards")
        self.name = Path(str(given[0])).name

    def __len__(self) -> int:
        return len(self.samples)

    def label(self, index: int) -> str:
        """See :class:`CaptionedSource`: the shard and the key."""
        sample = self.samples[index]
        return f"{sample.tar.name}:{sample.key}"

    def stamp(self, index: int) -> str:
        """See :class:`CaptionedSource`."""
        sample = self.samples[index]
        return f"{file_stamp(sample.tar)}|{sample.key}"

    def content(self, index: int) -> bytes:
        """See :class:`EncodedSource`."""
        sample = self.samples[index]
        assert sample.picture is not None
        return _part(sample, sample.picture)

    def caption(self, index: int) -> str:
        """See :class:`CaptionedSource`: ``key.txt``, else ``text``, ``caption`` or ``prompt`` in ``key.json``."""
        sample = self.samples[index]
        ending = next((ending for ending in ("txt", "json") if ending in sample.parts), None)
        if ending is None:
            return ""
        where = f"{sample.tar}: {sample.key}.{ending}"
        text = decoded_text(_part(sample, ending), where)
        if ending == "txt":
            return text.strip()
        try:
            return caption_of(json.loads(text))
        except (ValueError, AttributeError, RecursionError) as error:
            raise UsageError(f"{where}: expected a JSON object, found {text[:60]!r}") from error

    def describe(self) -> dict[str, Any]:
        """See :class:`CaptionedSource`."""
        return {"source": "webdataset", "name": self.name, "images": len(self), "shards": len(self.tars)}


def expand_braces(pattern: str) -> list[str]:
    """``a{0..2}`` and ``a{x,y}`` in full, as a shell would."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if numbers is None:
        values = match[1].split(",")
    else:
        values = [f"{number:0{len(numbers[1])}}" for number in range(int(numbers[1]), int(numbers[2]) + 1)]
    return [
        text for value in values for text in expand_braces(pattern[: match.start()] + value + pattern[match.end() :])
    ]


def _find(url: str) -> list[Path]:
    if "://" in url or url.startswith("pipe:"):
        raise UsageError(f"{url}: shards are read at random access, so they must be local; fetch them first")
    paths: list[Path] = []
    for name in expand_braces(str(Path(url).expanduser())):
        found = sorted(glob(name)) if not Path(name).is_file() else [name]
        if not found:
            raise UsageError(f"{name}: no such shard; check the path and its braces")
        paths += map(Path, found)
    return paths


def _index(tar: Path, endings: frozenset[str]) -> list[_Sample]:
    """The samples of a shard in order; keys end at the first dot of a member's name."""
    samples: dict[str, _Sample] = {}
    try:
        with tarfile.open(tar, "r:") as file:
            for member in file:
                if not member.isfile():
                    continue
                path = PurePosixPath(member.name)
                stem, _, ending = path.name.partition(".")
                key, ending = str(path.with_name(stem)) if stem else "", ending.lower()
                if not key or (ending not in ("txt", "json") and f".{ending}" not in endings):
                    continue
                sample = samples.setdefault(key, _Sample(tar, key))
                sample.parts[ending] = member.offset_data, member.size
                if f".{ending}" in endings:
                    sample.picture = ending
    except (OSError, tarfile.TarError) as error:
        raise UsageError(f"{tar}: no readable, uncompressed tar file ({reason(error)})") from error
    return list(samples.values())


def _part(sample: _Sample, ending: str) -> bytes:
    start, size = sample.parts[ending]
    with sample.tar.open("rb") as file:
        file.seek(start)
        content = file.read(size)
    if len(content) != size:
        raise OSError(f"{sample.tar}: truncated in {sample.key}.{ending}")
    return content
