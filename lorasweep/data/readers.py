"""Files and hub data sets to raw rows: CSV, JSON lines, Parquet, CoNLL columns, SQuAD JSON, plain text.

The owner of `datasets`. A row that cannot be read is a ConfigError with file and line.
"""

import csv
import json
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasweep.config import registry
from lorasweep.config.spec import DataSpec
from lorasweep.errors import ConfigError

Record = dict[str, Any]


@dataclass(frozen=True)
class Reader:
    suffix: str
    """How its files end, where a folder holds one a split."""
    read: Callable[[Path, DataSpec], list[Record]]


def reader(suffix: str) -> Callable[[Callable[..., list[Record]]], Callable[..., list[Record]]]:
    """Register a function as the reader of the source that it is named after: `read_csv` is `data.source=csv`.

    It takes a file and the settings of `data`, and returns a dict for each row, column name -> value. With a file
    conf/data/NAME.yaml like ours, `data=NAME` chooses it. One of another package is an entry point of the
    group lorasweep.readers, of the source's name.
    """

    def register(read: Callable[..., list[Record]]) -> Callable[..., list[Record]]:
        registry.READERS.add(read.__name__.removeprefix("read_"), Reader(suffix, read))
        return read

    return register


CHARACTERS_A_TOKEN = 3
"""A block of plain text is filled up to max_tokens times so many characters: it will hardly be cut."""


def read_splits(spec: DataSpec) -> dict[str, list[Record]]:
    """Return the raw rows of train and of the splits that were named."""
    wanted = {"train": spec.train_split, "eval": spec.eval_split, "test": spec.test_split}
    named = {name: split for name, split in wanted.items() if split}
    if spec.source == "hub":
        return {name: _read_hub(spec, split) for name, split in named.items()}
    path = Path(str(spec.path)).expanduser()
    chosen: Reader = registry.READERS.get(spec.source, lambda entry: isinstance(entry, Reader))
    problems, files = [], {}
    for name, split in named.items():
        try:
            files[name] = _split_file(path, split, chosen.suffix, name)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return {name: chosen.read(file, spec) for name, file in files.items()}


def _split_file(path: Path, split: str, suffix: str, name: str) -> Path:
    if path.is_file() and name == "train":
        return path
    folder = path.parent if path.is_file() else path
    if not folder.is_dir():
        raise ConfigError([f"data.path: no file or folder '{path}' (looked from {Path.cwd()})"])
    if (folder / split).is_file():
        return folder / split
    present = sorted(p for p in folder.iterdir() if p.suffix == suffix)
    matching = [p for p in present if p.stem == split] or [p for p in present if split in p.stem]
    if len(matching) == 1:
        return matching[0]
    found = "none" if not matching else ", ".join(p.name for p in matching)
    files = ", ".join(p.name for p in present) or f"no {suffix} file"
    raise ConfigError(
        [f"data.{name}_split: '{split}' must match one file in {folder}, matched {found}; it has {files}"]
    )


@reader(".csv")
def read_csv(path: Path, spec: DataSpec) -> list[Record]:
    quoting: Any = csv.QUOTE_MINIMAL if spec.quoting else csv.QUOTE_NONE
    delimiter = "\t" if spec.delimiter in ("tab", "\\t") else spec.delimiter
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, fieldnames=spec.header, delimiter=delimiter, quoting=quoting)
            rows = []
            for row in reader:
                extra = row.pop(None, None)
                if (extra and spec.header is None) or None in row.values():
                    raise ConfigError([f"{path}:{reader.line_num}: the row has not as many cells as the header"])
                rows.append(dict(row))
            return rows
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError([f"{path}: not a UTF-8 CSV file ({error})"]) from error


@reader(".jsonl")
def read_jsonl(path: Path, spec: DataSpec) -> list[Record]:
    rows, problems = [], []
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            problems.append(f"{path}:{number}: broken JSON ({error.msg} at column {error.colno})")
            continue
        if isinstance(row, dict):
            rows.append(row)
        else:
            problems.append(f"{path}:{number}: must be a JSON object, got {type(row).__name__}")
    if problems:
        raise ConfigError(problems[:10])
    return rows


@reader(".parquet")
def read_parquet(path: Path, spec: DataSpec) -> list[Record]:
    from datasets import Dataset

    try:
        return _with_names(Dataset.from_parquet(str(path)))
    except Exception as error:
        raise ConfigError([f"{path}: not a Parquet file ({type(error).__name__}: {error})"]) from error


def _read_hub(spec: DataSpec, split: str) -> list[Record]:
    from datasets import load_dataset

    try:
        return _with_names(load_dataset(str(spec.path), spec.config, split=split))
    except Exception as error:
        problem = f"data.path: cannot load '{spec.path}' split '{split}' from the hub ({type(error).__name__}: {error})"
        raise ConfigError([problem]) from error


def _with_names(table: Any) -> list[Record]:
    """Return the rows of a `datasets` table, lists of class numbers (tags) as the names of their classes."""
    from datasets import ClassLabel

    rows = list(table)
    for column, feature in table.features.items():
        classes = getattr(feature, "feature", None)
        if isinstance(classes, ClassLabel):
            rows = [row | {column: classes.int2str(row[column])} for row in rows]
    return rows


@reader(".conll")
def read_conll(path: Path, spec: DataSpec) -> list[Record]:
    """Return the sentences of a file with a word and its tag a line, divided by empty lines.

    Columns are divided by tabs where a line has one, else by white space; the first is the word and the last its tag.
    """
    rows: list[Record] = []
    problems = []
    open_row = False
    for number, line in enumerate(_text(path).split("\n"), 1):
        cells = [c.strip() for c in line.rstrip().split("\t")] if "\t" in line.rstrip() else line.split()
        if not cells or not any(cells) or cells[0] == "-DOCSTART-":
            open_row = False
        elif len(cells) < 2 or not cells[0] or not cells[-1]:
            problems.append(
                f"{path}:{number}: must be a word and a tag with a tab or white space between, got {line!r}"
            )
        else:
            if not open_row:
                rows.append({"tokens": [], "tags": []})
                open_row = True
            rows[-1]["tokens"].append(cells[0])
            rows[-1]["tags"].append(cells[-1])
    if problems:
        raise ConfigError(problems[:10])
    return rows


@reader(".json")
def read_squad(path: Path, spec: DataSpec) -> list[Record]:
    """Return one row a question of a SQuAD file (1.1 or 2.0); its group is the article's title."""
    try:
        articles = list(json.loads(_text(path))["data"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ConfigError([f"{path}: not a SQuAD file: JSON with a list 'data' ({error})"]) from error
    rows, problems = [], []
    for number, article in enumerate(articles, 1):
        try:
            title = article.get("title") or f"article {number}"
            for paragraph in article["paragraphs"]:
                for qa in paragraph["qas"]:
                    answers = [] if qa.get("is_impossible") else qa["answers"]
                    row = {"question": qa["question"], "context": paragraph["context"], "answers": answers}
                    rows.append(row | {"group": title})
        except (KeyError, TypeError, AttributeError) as error:
            wrong = f"{type(error).__name__}: {error}"
            problems.append(
                f"{path}: article {number} is not paragraphs with context, qas, question, answers ({wrong})"
            )
    if problems:
        raise ConfigError(problems[:10])
    return rows


@reader(".txt")
def read_text(path: Path, spec: DataSpec) -> list[Record]:
    """Return blocks of whole paragraphs (divided by empty lines) of about max_tokens at most; long ones by lines."""
    characters = spec.max_tokens * CHARACTERS_A_TOKEN
    pieces: list[str] = []
    for paragraph in re.split(r"\n[^\S\n]*\n\s*", _text(path).strip()):
        lines = [paragraph] if len(paragraph) <= characters else _lines(paragraph, characters)
        pieces += [*(f"{line}\n" for line in lines[:-1]), f"{lines[-1]}\n\n"]
    blocks = [""]
    for piece in pieces:
        if blocks[-1] and len(blocks[-1]) + len(piece) > characters:
            blocks.append("")
        blocks[-1] += piece
    return [{"text": block.strip()} for block in blocks if block.strip()]


def _lines(paragraph: str, characters: int) -> list[str]:
    """Return the lines of a paragraph, those longer than `characters` broken at white space where there is any."""
    return [
        part
        for line in paragraph.split("\n")
        for part in ([line] if len(line) <= characters else textwrap.wrap(line, characters))
    ]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError([f"{path}: not a UTF-8 file ({error})"]) from error
