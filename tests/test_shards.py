"""Members of tar shards: which are images, which captions, and what becomes of damaged ones."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from liftkit.data.captioned import WebDataset
from liftkit.errors import UsageError
from tests.test_captions import captions


def pack(path: Path, members: dict[str, bytes | str | None]) -> Path:
    """A tar file; a text is a link's target, None a FIFO."""
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size = len(content)
            else:
                info.type, info.linkname = (tarfile.FIFOTYPE, "") if content is None else (tarfile.SYMTYPE, content)
            tar.addfile(info, io.BytesIO(content) if isinstance(content, bytes) else None)
    return path


def png(color: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), color).save(buffer, "PNG")
    return buffer.getvalue()


def test_members_of_shards(tmp_path: Path) -> None:
    source = WebDataset(
        pack(
            tmp_path / "a.tar",
            {
                "0001.png": png(), "0001.txt": b"plain", "0001.seg.png": png("blue"),
                "IMG_12.05.2024.jpg": png(), "IMG_12.05.2024.TXT": b"dotted",
                "photo.v2.png": png(), "photo.v2.json": b'{"text": "two dots"}',
                "k.image.webp": png(), "k.txt": b"short key",
                "both.png": png(), "both.jpg": png(), "both.caption": b"shared",
                "m/x.png": png(), "m/metadata.jsonl": b'{"file_name": "x.png", "text": "by line"}\n',
                "._0001.png": png(), "__MACOSX/0001.png": png(), "link.png": "0001.png", "pipe.png": None,
                "raw.dng": png(), "lonely.txt": b"of no picture",
            },
        )
    )  # fmt: skip
    found = {label.partition(":")[2]: text for label, text in captions(source).items()}
    assert found == {
        "0001.png": "plain", "IMG_12.05.2024.jpg": "dotted", "photo.v2.png": "two dots", "k.image.webp": "short key",
        "both.png": "shared", "both.jpg": "shared", "m/x.png": "by line",
    }  # fmt: skip
    reasons = {reason: len(names) for reason, names in source.tally.left_out.items()}
    assert sorted(reasons.values()) == [1, 1, 2, 2]
    assert reasons["links or devices"] == 2
    assert list(source.texts[1].left_out["that belong to no picture"]) == ["a.tar:lonely.txt"]
    assert tuple(source.image(0, (16, 16)).shape) == (3, 16, 16)


def test_shards_that_are_cut_or_lie_about_sizes(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.tar", {"a.png": png(), "b.png": png()})
    whole = path.read_bytes()
    path.write_bytes(whole[:700])
    with pytest.raises(UsageError, match=r"a\.tar: no whole.*fetch it again"):
        WebDataset(path)
    for kind in (b"0", b"x", b"L"):
        header = bytearray(whole[:512])
        header[124:136] = b"\x80" + (2**62).to_bytes(11, "big")
        header[156:157] = kind
        header[148:156] = b" " * 8
        header[148:156] = f"{sum(header):06o}\0 ".encode()
        path.write_bytes(bytes(header) + whole[512:])
        with pytest.raises(UsageError, match=r"a\.tar"):
            WebDataset(path)
    os.mkfifo(tmp_path / "pipe.tar")
    with pytest.raises(UsageError, match=r"no regular file|no such shard"):
        WebDataset(tmp_path / "pipe.tar")


def test_a_damaged_member_is_no_end_of_a_shard(tmp_path: Path) -> None:
    whole = pack(tmp_path / "a.tar", {"a.png": png(), "b.png": png()}).read_bytes()
    at = whole.index(b"b.png")
    for damaged in (whole[:at] + b"X" + whole[at + 1 :], whole[: at + 100]):
        (tmp_path / "a.tar").write_bytes(damaged)
        with pytest.raises(UsageError, match=rf"a\.tar: .*no header of a member at byte {at}"):
            WebDataset(tmp_path / "a.tar")


def test_shards_that_were_joined_by_cat_are_read_to_the_end(tmp_path: Path) -> None:
    first = pack(tmp_path / "1.tar", {"a.png": png(), "a.txt": b"one"}).read_bytes()
    second = pack(tmp_path / "2.tar", {"b.png": png("blue"), "b.txt": b"two"}).read_bytes()
    (tmp_path / "a.tar").write_bytes(first + second)
    source = WebDataset(tmp_path / "a.tar")
    assert captions(source) == {"a.tar:a.png": "one", "a.tar:b.png": "two"}
    assert source.image(1, (16, 16))[2, 0, 0] == 255


def test_members_of_shards_are_known_by_their_content_and_all_text_is_accounted_for(tmp_path: Path) -> None:
    path = pack(
        tmp_path / "a.tar",
        {"a.img": png(), "a.txt": b"by content", "b": png(), "captions.jsonl": b"{}", "b.txt": "a.txt", "c.npy": b"x"},
    )
    source = WebDataset(path)
    assert captions(source) == {"a.tar:a.img": "by content", "a.tar:b": ""}
    assert source.texts[1].left_out == {
        "of a kind that is not read": {"a.tar:captions.jsonl": None},
        "links or devices": {"a.tar:b.txt": None},
    }


def test_braces_have_a_limit() -> None:
    for pattern in ("a{0..999999999}.tar", "{a,b}" * 17, "{0..999}{0..999}"):
        with pytest.raises(UsageError, match="braces"):
            WebDataset(pattern)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    changes=st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), min_size=1, max_size=8),
    cut=st.integers(0, 6000),
)
def test_changed_tar_files_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]], cut: int
) -> None:
    folder = tmp_path_factory.getbasetemp()
    path = pack(folder / "fuzzed.tar", {"a.png": png(), "a.txt": b"x", "m/metadata.csv": b"file_name,text\na,b\n"})
    content = bytearray(path.read_bytes()[: max(600, cut)])
    for place, value in changes:
        content[place % len(content)] = value
    path.write_bytes(content)
    try:
        source = WebDataset(path)
        captions(source)
    except UsageError:
        pass
