"""Files of prompts, each read as what it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from liftkit.data.prompts import read_prompts
from liftkit.errors import UsageError

FILES = {
    "a.txt": 'a red seven\r\n\n  {"text": "ä"}, plain \n',
    "a": 'a red seven\n{"text": "ä"}, plain',
    "b.jsonl": '{"text": "a red seven"}\n\n"{\\"text\\": \\"ä\\"}, plain"\r\n',
    "b.NDJSON": '{"prompt": "a red seven", "seed": 3}\n{"caption": ["{\\"text\\": \\"ä\\"}, plain"]}\n',
    "b.json": '["a red seven", {"prompt": "{\\"text\\": \\"ä\\"}, plain"}]',
    "c.json": '{"prompts": ["a red seven", "{\\"text\\": \\"ä\\"}, plain"]}',
    "c.csv": 'seed,prompt\r\n3,a red seven\r\n4,"{""text"": ""ä""}, plain"\r\n',
    "c.tsv": 'caption\tseed\na red seven\t3\n"{""text"": ""ä""}, plain"\t4\n',
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_prompts_are_read_as_what_the_file_is(name: str, encoding: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(FILES[name].encode(encoding))
    assert read_prompts(tmp_path / name) == ["a red seven", '{"text": "ä"}, plain']


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        (
            "a.jsonl",
            '{"text": "a"}\n{"label": "b"}\n',
            "a.jsonl:2: no prompt; expected a text, or text, caption, prompt",
        ),
        ("a.jsonl", "a red seven\n", "a.jsonl:1: expected JSON"),
        ("a.jsonl", "3\n", "a.jsonl:1: no prompt"),
        ("a.jsonl", "[" * 100_000, "a.jsonl:1: expected JSON"),
        ("a.json", '{"a": 1, "b": 2}', "expected a list of prompts, found dict"),
        ("a.json", '["a", ""]', "a.json:2: no prompt"),
        ("a.csv", "a red seven\na blue two\n", "expected a column text or caption or prompt, found 'a red seven'"),
        ("a.csv", "text,seed\nseven, on petals,3\n", "put quotes around a text"),
        ("a.csv", "text,seed\n,3\n", "a.csv:2: no prompt"),
        ("a.parquet", "PAR1", ".parquet files of prompts are not read"),
        ("a.txt", " \n", "the file holds no prompt"),
        ("a.csv", "text\n", "the file holds no prompt"),
    ],
)
def test_files_without_prompts_are_named(name: str, content: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UsageError) as caught:
        read_prompts(tmp_path / name)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
