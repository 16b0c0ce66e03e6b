"""CoNLL columns: a word and its tags a line, sentences divided by empty lines; CoNLL-U with its columns by name."""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from lorasweep.config.spec import DataSpec
from lorasweep.data import files
from lorasweep.data.table import Row, Table
from lorasweep.errors import ConfigError

CONLLU = ("id", "form", "lemma", "upos", "xpos", "feats", "head", "deprel", "deps", "misc")
NUMBER = re.compile(r"\d+([-.]\d+)?")
"""First cell of a CoNLL-U line: a word, several written as one (1-2), or one that is not written (1.1)."""

MARK = re.compile(r"O|[BIESLUM]-\S+")
"""Tags that mark entities, in every scheme."""

VARIATION_SELECTORS = range(0xFE00, 0xFE10)


def is_conllu(lines: Sequence[str]) -> bool:
    """Tell whether lines have CoNLL-U's ten columns, the first a number."""
    rows = [line.split("\t") for line in lines if line.strip() and not line.startswith("#")][:50]
    return bool(rows) and all(len(r) == len(CONLLU) and NUMBER.fullmatch(r[0]) for r in rows)


def read_conll(path: Path, spec: DataSpec) -> Table:
    """Return the sentences of a file. Columns are divided by tabs where a line has one, else by spaces; the first is
    the word and the last its tag.
    """
    text, notes = files.text_of(path, spec.encoding)
    lines = [line.rstrip("\r") for line in text.split("\n")]
    if is_conllu(lines):
        return _read_conllu(path, lines, spec, notes)
    cells = [_cells(line) for line in lines]
    width = Counter(len(c) for c in cells if c and not c[0].startswith("#")).most_common(1)
    usual = width[0][0] if width else 2
    tags = {c[-1] for c in cells if len(c) == usual and not c[0].startswith("#")}
    table = Table(columns=["tokens", "tags"], notes=notes)
    sentence: Row | None = None
    bad: str | None = None
    for number, row in enumerate(cells, 1):
        if not row or row[0] == "-DOCSTART-":
            _close(table, sentence, bad)
            sentence = bad = None
        elif sentence is None and _is_comment(row, usual, tags):
            continue
        else:
            if sentence is None:
                sentence = Row({"tokens": [], "tags": []}, str(path), number)
            if len(row) < 2 or not row[0] or not row[-1]:
                line = lines[number - 1]
                bad = bad or f"{path}:{number}: must be a word and a tag with a tab or a space between, got {line!r}"
            else:
                sentence["tokens"].append(row[0])
                sentence["tags"].append(row[-1])
    _close(table, sentence, bad)
    if not table.rows:
        raise ConfigError(table.broken[:10] or [f"data.path: {path} holds no sentence"])
    return table


def _cells(line: str) -> list[str]:
    """Return the cells of a line; a no-break space is a part of a word."""
    if not line.strip():
        return []
    if "\t" in line.strip(" \t"):
        return [c.strip(" ") for c in line.strip("\t ").split("\t")]
    return re.split(r"[ \t]+", line.strip(" \t"))


def _is_comment(row: Sequence[str], usual: int, tags: set[str]) -> bool:
    """Tell a comment before a sentence from a word such as `#` or `#tag`, which has a tag that other words have."""
    return row[0].startswith("#") and (len(row) != usual or not (row[-1] in tags or MARK.fullmatch(row[-1])))


def _close(table: Table, sentence: Row | None, bad: str | None) -> None:
    if bad is not None:
        table.broken.append(bad)
    elif sentence is not None:
        table.rows.append(sentence)


def _read_conllu(path: Path, lines: Sequence[str], spec: DataSpec, notes: list[str]) -> Table:
    """Return sentences with each column as a list by its name; words written as one are read one by one."""
    names = [n for n in CONLLU if n not in ("id", "form")]
    table = Table(columns=["tokens", *names], notes=notes)
    sentence: Row | None = None
    joined = unwritten = 0
    for number, line in enumerate([*lines, ""], 1):
        if line.startswith("#"):
            continue
        if not line.strip():
            if sentence is not None:
                table.rows.append(sentence)
            sentence = None
            continue
        cells = line.split("\t")
        if len(cells) != len(CONLLU):
            table.broken.append(f"{path}:{number}: must have {len(CONLLU)} columns divided by tabs, has {len(cells)}")
            continue
        joined += "-" in cells[0]
        unwritten += "." in cells[0]
        if not cells[0].isdigit():
            continue
        if sentence is None:
            sentence = Row({name: [] for name in table.columns}, str(path), number)
        for name, cell in zip(CONLLU[1:], cells[1:], strict=True):
            sentence["tokens" if name == "form" else name].append(cell)
    if joined or unwritten:
        notes.append(
            f"{path.name}: {joined} words written as one are read as their parts, {unwritten} empty nodes are left out"
        )
    return table


def is_invisible(word: str) -> bool:
    """Tell whether a word has no character that a person sees: zero-width, soft hyphen, variation selector, space."""
    return all(unicodedata.category(c) in ("Cf", "Cc", "Zs", "Zl", "Zp") or ord(c) in VARIATION_SELECTORS for c in word)


def visible(tokens: Sequence[str], tags: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return words and tags without invisible words; where such a word begins an entity, the next one does."""
    words: list[str] = []
    kept: list[str] = []
    begun = ""
    for word, tag in zip(tokens, tags, strict=True):
        if is_invisible(word):
            begun = tag if tag.startswith("B-") else ""
            continue
        if begun and tag == f"I-{begun[2:]}":
            tag = begun
        begun = ""
        words.append(word)
        kept.append(tag)
    return words, kept
