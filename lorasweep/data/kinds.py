"""What kind of file it is, by its content; its name only decides between what the content leaves open."""

import json
import re
from collections import Counter
from pathlib import Path

from lorasweep.data import class_folders, conll, files
from lorasweep.data.json_table import is_squad

SUFFIXES = {
    "csv": (".csv", ".tsv"),
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "parquet": (".parquet", ".pq"),
    "arrow": (".arrow", ".feather"),
    "excel": (".xlsx", ".xlsm"),
    "conll": (".conll", ".conllu", ".bio", ".iob", ".iob2"),
    "squad": (".json",),
    "text": (".txt", ".md"),
}
"""Kind of file -> what their names end in."""

SAMPLE_BYTES = 2**18
JSON_START = re.compile(r"\{\s*[\"}]|\[\s*[\[{]")
TAG = re.compile(r"[BIEOSLUM]|[BIESLUM][-_].+|[A-Z]{1,5}\$?|_|[^\w\s]+")
"""What the last column of a CoNLL file holds: O, B-x, or a part of speech in capitals."""


def suffix_of(path: Path) -> str:
    """Return what a file's name ends in, without the end that tells its compression."""
    name = path.name.lower()
    for end in files.COMPRESSED_SUFFIXES:
        name = name.removesuffix(end)
    return Path(name).suffix


def kind_of(path: Path) -> str:
    """Return the kind of a file, or of a folder that is one table. Raises ConfigError for what is no data."""
    if path.is_dir():
        return "text" if class_folders.classes(path) else "arrow"
    if files.is_workbook(path):
        return "excel"
    start = files.content(path, at_most=SAMPLE_BYTES)
    if start[:4] == b"PAR1":
        return "parquet"
    if start[:6] == b"ARROW1" or (start[:4] == b"\xff\xff\xff\xff" and suffix_of(path) == ".arrow"):
        return "arrow"
    text = start.decode(files.encoding_of(start) or "latin-1", "replace").lstrip("\ufeff").lstrip()
    if JSON_START.match(text):
        return _json_kind(path, text)
    lines = text.splitlines()
    named = next((k for k, ends in SUFFIXES.items() if suffix_of(path) in ends and k not in ("jsonl", "squad")), None)
    if named in ("csv", "conll"):
        return "conll" if named == "csv" and _is_without_header(lines) else named
    return _text_kind(lines)


def _json_kind(path: Path, start: str) -> str:
    if "paragraphs" not in start:
        return "jsonl"
    try:
        return "squad" if is_squad(json.loads(files.text_of(path)[0])) else "jsonl"
    except (ValueError, RecursionError):
        return "jsonl"


def _is_without_header(lines: list[str]) -> bool:
    """Tell CoNLL's words and tags from a table with a header, which has a name over its tags."""
    cells = [line.split("\t") for line in lines[:200] if line.strip()]
    return (
        bool(cells)
        and all(len(c) > 1 and conll.MARK.fullmatch(c[-1].strip()) for c in cells)
        and any(not line.strip() for line in lines[:200])
    )


def _text_kind(lines: list[str]) -> str:
    """Tell a table or tagged words from running text, in a file whose name does not tell."""
    rows = [line for line in lines if line.strip()][:200]
    if conll.is_conllu(rows):
        return "conll"
    cells = [re.split(r"[ \t]+", r.strip()) for r in rows if not r.startswith(("#", "-DOCSTART-"))]
    widths = Counter(map(len, cells)).most_common(1)
    if widths and widths[0][0] > 1 and widths[0][1] >= 0.95 * len(cells) and len(rows) < len(lines):
        tagged = sum(bool(TAG.fullmatch(c[-1])) for c in cells)
        if tagged >= 0.9 * len(cells):
            return "conll"
    for delimiter in ("\t", ",", ";", "|"):
        header = rows[0].split(delimiter) if rows else []
        fit = sum(len(r.split(delimiter)) >= len(header) for r in rows)
        names = all(0 < len(h.strip()) <= 40 and len(h.split()) <= 3 for h in header)
        if len(header) > 1 and names and fit >= 0.9 * len(rows):
            return "csv"
    return "text"
