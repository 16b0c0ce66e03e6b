"""Rows as a file holds them, each with its place in the file, and what a person has to know about them."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorasweep.errors import ConfigError

Record = dict[str, Any]

WHOLE = " whole "
"""Unit of a row that is a whole file."""

USUAL_SPLITS = {"eval": ("validation", "valid", "eval", "dev", "val"), "test": ("test",)}
"""Names under which a folder or a file holds the splits that were not named."""
MOST_COLUMNS = 10_000
"""Columns of a file; more are a table on its side, or no table."""
MOST_CHARACTERS = 2**22
"""Characters of a cell: four long novels. A longer text is split before, or read as data.source=text."""


class Row(Record):
    """Cells or fields by name; `place` says where they stand, as `file:line`, and `goes_on` that the text does so in
    the next row.
    """

    __slots__ = ("file", "goes_on", "number", "unit")

    def __init__(
        self, cells: Mapping[str, Any], file: str = "", number: int = 0, unit: str = ":", goes_on: bool = False
    ) -> None:
        super().__init__(cells)
        self.file, self.number, self.unit, self.goes_on = file, number, unit, goes_on

    @property
    def place(self) -> str:
        return self.file if self.unit == WHOLE else f"{self.file}{self.unit}{self.number}"

    def __reduce__(self) -> tuple[Any, ...]:
        return Row, (dict(self), self.file, self.number, self.unit, self.goes_on)

    def like(self, cells: Mapping[str, Any]) -> "Row":
        """Return other cells at the same place."""
        return Row(cells, self.file, self.number, self.unit, self.goes_on)


def place_of(record: Record, number: int) -> str:
    """Return where a record stands; `number` counts those that come from no file."""
    return record.place if isinstance(record, Row) and record.file else f"row {number}"


def at_first(records: Sequence[Record], value: str, values_of: Callable[[Record], Collection[str]]) -> str:
    """Return ` (file:line)` of the first record that holds a value, nothing where that comes from no file."""
    first = next((r for r in records if value in values_of(r)), None)
    return f" ({first.place})" if isinstance(first, Row) and first.file else ""


@dataclass
class Table:
    rows: list[Row] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)
    """Names of all columns, each once."""
    broken: list[str] = field(default_factory=list)
    """Rows that could not be read: `file:line: what is wrong`."""
    notes: list[str] = field(default_factory=list)
    class_names: dict[str, list[str]] = field(default_factory=dict)
    """Column -> names of its classes in their order, where the file holds them (datasets' ClassLabel)."""
    repeated: list[str] = field(default_factory=list)
    """Names that two columns have."""
    others: "dict[str, Table]" = field(default_factory=dict)
    """Of train: further splits that the same file holds."""

    def extend(self, other: "Table") -> None:
        """Take the rows of another file of the same split after ours."""
        self.rows += other.rows
        for mine, theirs in (
            (self.columns, other.columns),
            (self.notes, other.notes),
            (self.repeated, other.repeated),
        ):
            mine += [x for x in theirs if x not in mine]
        self.broken += other.broken
        self.class_names |= other.class_names

    def bounded(self, path: Path) -> "Table":
        """Return the table without the rows that have a cell too long to be read.

        Raises ConfigError where it has more columns than a table can have.
        """
        if len(self.columns) > MOST_COLUMNS:
            rule = f"has {len(self.columns):,} columns, at most {MOST_COLUMNS:,} are read"
            raise ConfigError([f"data.path: {path} {rule}; is it the table, and the right data.delimiter?"])
        long = [(row, _longest(row)) for row in self.rows]
        self.broken += [
            f"{row.place}: a cell has {length:,} characters, at most {MOST_CHARACTERS:,} are read; split the text"
            for row, length in long
            if length > MOST_CHARACTERS
        ]
        self.rows = [row for row, length in long if length <= MOST_CHARACTERS]
        if long and not self.rows:
            raise ConfigError(self.broken[:10])
        return self

    def cells_of(self, column: str) -> list[Any]:
        """Return what stands in a column, None where a row lacks it."""
        return [row.get(column) for row in self.rows]


def _longest(row: Row) -> int:
    return max((len(cell) for cell in row.values() if isinstance(cell, str)), default=0)


def columns_of(rows: Sequence[Row]) -> list[str]:
    """Return the names that occur in any of the rows, in order of their first occurrence."""
    names: dict[str, None] = {}
    for row in rows:
        if not row.keys() <= names.keys():
            names.update(dict.fromkeys(row))
    return list(names)
