"""CSV as people have it: any delimiter and encoding, Excel's `sep=` line, trailing commas, quotes that never close.

Python's csv module reads the cells; here is what it does not tell: which line a row begins at, and which rows a stray
quote would swallow.
"""

import csv
import io
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from lorasweep.config.spec import DataSpec
from lorasweep.data import files
from lorasweep.data.columns import USUAL
from lorasweep.data.table import Row, Table
from lorasweep.errors import ConfigError

DELIMITERS = (",", "\t", ";", "|")
NAMES = {"\t": "tab", "\\t": "tab"}
SAMPLE_LINES = 200
MOST_ABOVE = 10
"""Lines among which a header is sought."""
INVISIBLE = " \t\u00a0\ufeff\u200b"
"""Taken off both ends of a column's name."""


@dataclass
class Records:
    """The cells of each row with the line it begins at, and what could not be read."""

    cells: list[tuple[int, list[str]]]
    broken: list[str]


def read_csv(path: Path, spec: DataSpec) -> Table:
    """Return the rows of a CSV file. Raises ConfigError for a file without a table in it."""
    csv.field_size_limit(sys.maxsize)
    text, notes = files.text_of(path, spec.encoding)
    lines = list(io.StringIO(text, newline=""))
    skipped = 0
    delimiter = "\t" if spec.delimiter in ("tab", "\\t") else spec.delimiter
    told = _sep_line(lines[0])
    if told:
        lines, skipped, delimiter = lines[1:], 1, delimiter or told
    above = _lines_above_header(lines, spec)
    if above:
        lines, skipped = lines[above:], skipped + above
        notes.append(f"the header of {path.name} is line {skipped + 1}; what stands above it is not read")
    if delimiter is None:
        delimiter = find_delimiter(lines, spec)
        if delimiter != ",":
            notes.append(f"cells of {path.name} are divided by '{NAMES.get(delimiter, delimiter)}'")
    table = _table(path, spec, delimiter, _records(lines, skipped, path, _dialect(lines, delimiter, spec)), notes)
    if table.broken and '\\"' in text:
        dialect = _dialect(lines, delimiter, spec, escaped=True)
        other = _table(path, spec, delimiter, _records(lines, skipped, path, dialect), notes)
        if len(other.broken) < len(table.broken):
            table = other
            notes.append(f'quotes inside the cells of {path.name} are written \\"')
    if not table.rows and not table.broken:
        raise ConfigError([f"data.path: {path} holds no row"])
    return table.bounded(path)


def _sep_line(line: str) -> str | None:
    """Return the delimiter that Excel's first line names, as in `sep=;`."""
    bare = line.strip("\r\n").strip('"')
    return bare[4:] if bare.lower().startswith("sep=") and len(bare) == 5 else None


def _lines_above_header(lines: Sequence[str], spec: DataSpec) -> int:
    """Return how many lines stand above the header, as a title or comments do: none unless two names of columns stand
    further down alone.
    """
    if spec.header is not None:
        return 0
    names = {*_wanted(spec), *chain.from_iterable(USUAL.values())}
    counts = [_most_named(line, names) for line in lines[:MOST_ABOVE]]
    if not counts or counts[0]:
        return 0
    return next((number for number, count in enumerate(counts) if count >= 2), 0)


def _most_named(line: str, names: Collection[str]) -> int:
    """Return how many names of columns stand in a line, however its cells are divided."""
    return max(sum(cell.strip(f'{INVISIBLE}"\r\n') in names for cell in line.split(d)) for d in DELIMITERS)


def _wanted(spec: DataSpec) -> set[str]:
    columns = {v for k, v in vars(spec).items() if k.endswith("_column") and isinstance(v, str)}
    return columns | set(spec.label_columns or [])


def find_delimiter(lines: Sequence[str], spec: DataSpec) -> str:
    """Return the delimiter that divides the most rows into as many cells as the header; a comma for a single column."""
    wanted = _wanted(spec)
    best, found = (0, 0.0, 0), ","
    for delimiter in DELIMITERS:
        dialect = {"delimiter": delimiter, "quoting": csv.QUOTE_MINIMAL if spec.quoting else csv.QUOTE_NONE}
        rows = [r for r in csv.reader(lines[:SAMPLE_LINES], **dialect) if any(r)]  # type: ignore[arg-type]
        header = spec.header or (rows[0] if rows else [])
        if len(header) < 2:
            continue
        fit = sum(len(r) >= len(header) and not any(r[len(header) :]) for r in rows) / len(rows)
        named = sum(c.strip(INVISIBLE) in wanted for c in header)
        if (named, round(fit, 1), len(header)) > best and fit > 0.5:
            best, found = (named, round(fit, 1), len(header)), delimiter
    return found


def _dialect(lines: Sequence[str], delimiter: str, spec: DataSpec, escaped: bool = False) -> dict[str, Any]:
    """Return what the csv module needs to know. A header such as `text, label` tells of spaces after each delimiter."""
    spaced = delimiter != "\t" and delimiter + " " in lines[0]
    return {
        "delimiter": delimiter,
        "quoting": csv.QUOTE_MINIMAL if spec.quoting else csv.QUOTE_NONE,
        "skipinitialspace": spaced,
        "escapechar": "\\" if escaped else None,
    }


# --- rows ------------------------------------------------------------------------------------------------------------


def _records(lines: Sequence[str], skipped: int, path: Path, dialect: dict[str, Any]) -> Records:
    """Return all rows. A row whose quote is not closed is left out by itself; those after it are read."""
    found = Records([], [])
    quoted: list[tuple[int, int]] = []
    """Index in found.cells, and lines, of the rows that span several lines."""
    start = 0
    while start < len(lines):
        reader = csv.reader(islice(lines, start, None), strict=True, **dialect)
        begun = start
        try:
            for cells in reader:
                end = start + reader.line_num
                if cells:
                    quoted += [(len(found.cells), end - begun)] if end - begun > 1 else []
                    found.cells.append((skipped + begun + 1, cells))
                begun = end
            break
        except csv.Error:
            alone = _alone(lines[begun], dialect)
            if alone is not None:
                found.cells.append((skipped + begun + 1, alone))
            else:
                found.broken.append(f"{path}:{skipped + begun + 1}: a quote opens and is not closed")
            start = begun + 1
    return _without_swallowed(found, quoted, lines, skipped, path, dialect)


def _alone(line: str, dialect: dict[str, Any]) -> list[str] | None:
    """Return the cells of a line with characters after a closing quote, or None where a quote stays open."""
    if line.count('"') % 2:
        return None
    return next(csv.reader([line], strict=False, **dialect), [])


def _without_swallowed(
    found: Records, quoted: Sequence[tuple[int, int]], lines: Sequence[str], skipped: int, path: Path, dialect: Any
) -> Records:
    """Return the records with those undone that a stray quote made of several rows, which are then read one by one."""
    if not quoted:
        return found
    spans = dict(quoted)
    width = len(found.cells[0][1])
    values = _frequent(cells for i, (_, cells) in enumerate(found.cells) if i not in spans)
    kept: list[tuple[int, list[str]]] = []
    for i, (number, cells) in enumerate(found.cells):
        first = number - 1 - skipped
        own = lines[first : first + spans.get(i, 1)]
        if len(own) == 1 or not _swallows(own, width, values, dialect["delimiter"]):
            kept.append((number, cells))
            continue
        found.broken.append(f"{path}:{number}: a quote opens and is not closed in its row")
        again = _records(own[1:], number, path, dialect)
        kept += again.cells
        found.broken += again.broken
    return Records(kept, found.broken)


def _swallows(lines: Sequence[str], width: int, values: Mapping[int, set[str]], delimiter: str) -> bool:
    """Tell whether one of a row's lines looks like a new row: as many cells as the header, and, outside of what the
    quotes may rightly hold, a value that its column often has.
    """
    for i, line in enumerate(lines):
        cells = line.rstrip("\r\n").split(delimiter)
        if len(cells) != width or width < 2:
            continue
        quotes = [k for k, c in enumerate(cells) if '"' in c]
        first = quotes[-1] + 1 if i == 0 and quotes else 0
        last = quotes[0] if i == len(lines) - 1 and quotes else width
        if any(cells[k] in values.get(k, ()) for k in range(first, last)):
            return True
    return False


def _frequent(rows: Iterable[Sequence[str]]) -> dict[int, set[str]]:
    """Return, for each column, the values that occur more than once."""
    counts: dict[int, Counter[str]] = {}
    for cells in rows:
        for k, cell in enumerate(cells):
            counts.setdefault(k, Counter())[cell] += 1
    return {column: _repeated(seen) for column, seen in counts.items()}


def _repeated(seen: Counter[str]) -> set[str]:
    return {value for value, n in seen.items() if n > 1 and value}


# --- columns ---------------------------------------------------------------------------------------------------------


def _table(path: Path, spec: DataSpec, delimiter: str, records: Records, notes: list[str]) -> Table:
    if not records.cells:
        return Table(broken=records.broken, notes=notes)
    header = spec.header or [name.strip(INVISIBLE) for name in records.cells[0][1]]
    body = records.cells
    if not spec.header or [c.strip(INVISIBLE) for c in body[0][1]] == list(spec.header):
        body = body[1:]
    body = [(number, cells) for number, cells in body if "".join(cells).strip()]
    width = max((len(c) for _, c in body), default=0)
    if spec.header is None:
        header = _whole_header(header, body, width)
    names = [name or f"Unnamed: {i}" for i, name in enumerate(header)]
    columns = list(dict.fromkeys(names))
    repeated = [n for n, count in Counter(names).items() if count > 1]
    table = Table([], columns, records.broken, notes, {}, repeated)
    for number, cells in body:
        more = cells[len(names) :]
        if any(more) and spec.header is None:
            table.broken.append(
                f"{path}:{number}: {len(cells)} cells, the header has {len(names)}; put quotes around a cell that "
                f"holds '{NAMES.get(delimiter, delimiter)}'"
            )
            continue
        values = [*cells, *[None] * (len(names) - len(cells))]
        table.rows.append(Row(dict(zip(names, values, strict=False)), str(path), number))
    return table


def _whole_header(header: list[str], body: Sequence[tuple[int, list[str]]], width: int) -> list[str]:
    """Return the header without empty columns at its end, or with a name for row names, as R leaves them out."""
    while header and not header[-1] and not any(len(c) >= len(header) and c[len(header) - 1] for _, c in body):
        header = header[:-1]
    longer = sum(len(cells) == len(header) + 1 and bool(cells[-1]) for _, cells in body)
    if len(body) > 1 and longer == len(body) and all(_is_number(c[0]) for _, c in body):
        return ["", *header]
    return header


def _is_number(cell: str) -> bool:
    return cell.strip().isascii() and cell.strip().isdigit()
