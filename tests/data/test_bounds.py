"""Files made to exhaust a reader are refused in a sentence, in seconds."""

import bz2
import gzip
import json
import lzma

import pytest

from lorasweep.config.spec import DataSpec
from lorasweep.data import files, json_table
from lorasweep.errors import ConfigError


@pytest.mark.parametrize("opener", [gzip.open, bz2.open, lzma.open])
def test_archive_that_grows_without_end_is_refused(opener, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "SURELY_SMALL", 2**16)
    path = tmp_path / "rows.jsonl.gz"
    with opener(path, "wb") as file:
        file.write(b" " * 2**23)
    with pytest.raises(ConfigError, match="grows to more than 200 times its size"):
        files.content(path)


@pytest.mark.parametrize("opener", [gzip.open, bz2.open, lzma.open])
def test_archive_of_ordinary_rows_is_read(opener, tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    rows = json.dumps({"text": "some words", "label": 1}).encode() + b"\n"
    with opener(path, "wb") as file:
        file.write(rows * 1000)
    assert files.content(path) == rows * 1000


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize("text", [f'{{"text": {DEEP}}}\n{{"text": "b"}}\n', DEEP, f'[{{"text": "a"}}, {DEEP}]'])
def test_json_deeper_than_python_reads_is_named(text, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    try:
        broken = json_table.read_jsonl(path, DataSpec()).broken
    except ConfigError as error:
        broken = error.problems
    assert any("deeper than Python reads" in problem for problem in broken)
