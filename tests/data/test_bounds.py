"""Files made to exhaust a reader are refused in a sentence, in seconds."""

import bz2
import gzip
import json
import lzma

import pytest

from lorasweep.config.spec import DataSpec
from lorasweep.data import csv_table, files, json_table, table
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


@pytest.mark.parametrize("place", ["first", "last"])
@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_row_with_a_cell_of_millions_of_characters_is_left_out_by_name(place, suffix, tmp_path, monkeypatch):
    monkeypatch.setattr(table, "MOST_CHARACTERS", 200_000)
    rows = [("word " * 100_000, 1), ("a", 0), ("b", 1)]
    rows = rows if place == "first" else rows[::-1]
    path = tmp_path / f"rows.{suffix}"
    if suffix == "csv":
        path.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
        found = csv_table.read_csv(path, DataSpec())
    else:
        path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))
        found = json_table.read_jsonl(path, DataSpec())
    assert [row["text"] for row in found.rows] == [text for text, _ in rows if len(text) == 1]
    assert "a cell has 500,000 characters, at most 200,000 are read" in found.broken[0]


def test_table_of_a_million_columns_is_refused(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(",".join(f"c{i}" for i in range(100_000)) + "\n" + ",".join("1" * 100_000) + "\n")
    with pytest.raises(ConfigError, match="has 100,000 columns, at most 10,000 are read"):
        csv_table.read_csv(path, DataSpec())


def test_file_of_one_endless_line_is_refused(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("x" * 5_000_000)
    with pytest.raises(ConfigError, match="holds no row"):
        csv_table.read_csv(path, DataSpec())
