"""The one reader of text."""

import os

import pytest

from liftkit.checkpoint.text import decode_text, lines, printable, read_text
from liftkit.errors import UsageError


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_encodings_with_marks_are_read(tmp_path, encoding):
    file = tmp_path / "caption.txt"
    file.write_bytes("a café\r\nin fog".encode(encoding))
    assert read_text(file) == "a café\r\nin fog"


def test_other_encodings_are_named(tmp_path):
    file = tmp_path / "caption.txt"
    file.write_bytes(b"it\x92s")
    with pytest.raises(UsageError, match=r"caption\.txt: no UTF-8 text .* at byte 2"):
        read_text(file)


def test_pipes_and_huge_files_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="no regular file"):
        read_text(tmp_path / "pipe")
    (tmp_path / "huge").write_bytes(b"x" * 11)
    with pytest.raises(UsageError, match="too large"):
        read_text(tmp_path / "huge", limit=10)
    assert read_text(tmp_path / "huge", limit=11) == "x" * 11


def test_only_newlines_end_lines():
    text = "a\u2028b\x85c\r\n\n  \nd"
    assert list(lines(text)) == [(1, "a\u2028b\x85c"), (4, "d")]


def test_printable_cannot_steer_a_terminal():
    assert printable("a\x1b[31m\x9b2J\x7f\u202e\u2028z\tb\n") == "a\\x1b[31m\\x9b2J\\x7f\\u202e\\u2028z\tb\n"
    assert printable("café 漢字 🎉") == "café 漢字 🎉"
    assert decode_text(printable("\udcff").encode(), "x") == "\\udcff"
