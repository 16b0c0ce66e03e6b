"""Tables of words, a row a word: put together into sentences, by a column that numbers them or by blank lines."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from lorasweep.data.columns import USUAL, same_name
from lorasweep.data.table import Row, Table
from lorasweep.errors import ConfigError

IDS = (
    *("sentence_id", "sentence #", "sentence_idx", "sentence_no", "sentence_number", "sent_id", "sentid", "sent"),
    *("sentence", "doc_id", "document_id", "id"),
)
"""Usual names of the column that is equal for the words of a sentence, or filled at its first word alone."""

MOST_STARTS = 0.9
"""Share of words that may begin a sentence."""
FEWEST = 20
"""Rows of single words that are certainly no sentences."""


def sentences(tables: Mapping[str, Table], tokens: str, tags: str) -> dict[str, Table]:
    """Return the tables with a row for each sentence, where a row is a word; others as they are.

    Raises ConfigError where nothing tells which words are one sentence.
    """
    return {name: _sentences(table, tokens, tags) for name, table in tables.items()}


def _sentences(table: Table, tokens: str, tags: str) -> Table:
    word = _word_column(table, tokens)
    if word is None or len(table.rows) < FEWEST or not all(_is_word(row.get(word)) for row in table.rows):
        return table
    tag = tags if tags in table.columns else _usual(table, "tags", word)
    if tag is None or not all(isinstance(row.get(tag), str | int) for row in table.rows if not _is_blank(row[word])):
        return table
    ids = [c for name in IDS if (c := same_name(name, table.columns)) and c not in (word, tag)]
    column = next((c for c in ids if _divides(_by_column(table.rows, c), table.rows)), None)
    starts = _by_column(table.rows, column) if column else _by_blank_lines(table.rows)
    if not _divides(starts, table.rows):
        raise ConfigError(
            [
                "data.tokens_column: a row of this table is one word, and nothing tells where a sentence ends; "
                "divide sentences by blank lines, or number them in a column called sentence_id"
            ]
        )
    rows = []
    for start, end in pairwise([*starts, len(table.rows)]):
        members = [row for row in table.rows[start:end] if not _is_blank(row[word])]
        if members:
            rows.append(members[0].like({word: [str(r[word]) for r in members], tag: [str(r[tag]) for r in members]}))
    by = f"the column {column}" if column else "blank lines"
    notes = [*table.notes, f"{len(table.rows)} rows of a word each are {len(rows)} sentences, divided by {by}"]
    return Table(rows, [word, tag], table.broken, notes, table.class_names, table.repeated)


def _word_column(table: Table, asked: str) -> str | None:
    return asked if asked in table.columns else _usual(table, "tokens", None)


def _usual(table: Table, field: str, taken: str | None) -> str | None:
    found = (same_name(name, table.columns) for name in USUAL[field])
    return next((c for c in found if c and c != taken and c not in IDS), None)


def _is_blank(value: Any) -> bool:
    return value is None or value == "" or value != value


def _divides(starts: Sequence[int], rows: Sequence[Row]) -> bool:
    """Tell whether sentences begin there: several, and not one at each word, as the numbers of the rows would say."""
    return 1 < len(starts) < MOST_STARTS * len(rows)


def _is_word(value: Any) -> bool:
    """Tell whether a cell holds one word, or nothing."""
    if _is_blank(value):
        return True
    return isinstance(value, str | int | float) and not str(value).startswith("[") and len(str(value).split()) <= 1


def _by_column(rows: Sequence[Row], column: str) -> list[int]:
    """Return where a sentence begins: at each new value; a column filled at first words alone has empty cells after."""
    starts, last = [], None
    for number, row in enumerate(rows):
        value = row.get(column)
        if not number or (not _is_blank(value) and value != last):
            starts.append(number)
        last = last if _is_blank(value) else value
    return starts


def _by_blank_lines(rows: Sequence[Row]) -> list[int]:
    """Return where a sentence begins: after lines of the file that hold nothing."""
    return [0, *(n for n, (a, b) in enumerate(pairwise(rows), 1) if b.number > a.number + 1 or b.file != a.file)]
