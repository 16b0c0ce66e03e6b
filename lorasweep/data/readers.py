"""Files and hub data sets to tables: a reader for each kind of file.

The owner of `datasets`. A row that cannot be read is named by file and line.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, takewhile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lorasweep.config import registry
from lorasweep.config.spec import DataSpec
from lorasweep.data import class_folders, files, json_table
from lorasweep.data.conll import read_conll
from lorasweep.data.csv_table import read_csv
from lorasweep.data.json_table import read_jsonl, read_squad
from lorasweep.data.kinds import SUFFIXES, kind_of, suffix_of
from lorasweep.data.split_files import split_files
from lorasweep.data.table import WHOLE, Record, Row, Table, columns_of
from lorasweep.errors import ConfigError

HUB_WAIT_S = 5.0
FASTTEXT = "__label__"
FILE_MARK = b"ARROW1"
"""How an Arrow file begins, in difference to a stream."""

Read = Callable[[Path, DataSpec], Table | list[Record]]


@dataclass(frozen=True)
class Reader:
    suffixes: tuple[str, ...]
    """How its files end, where a folder holds them."""
    read: Read


def reader(*suffixes: str) -> Callable[[Read], Read]:
    """Register a function as the reader of the source that it is named after: `read_csv` is `data.source=csv`.

    It takes a file and the settings of `data`, and returns a Table, or a dict for each row, column name -> value. With
    a file conf/data/NAME.yaml like ours, `data=NAME` chooses it. One of another package is an entry point of the group
    lorasweep.readers, of the source's name.
    """

    def register(read: Read) -> Read:
        registry.READERS.add(read.__name__.removeprefix("read_"), Reader(suffixes, read))
        return read

    return register


def files_of(spec: DataSpec) -> tuple[dict[str, list[Path]], list[str]]:
    """Return split -> files, and what was found without being asked for."""
    if _splits_inside(spec):
        spec = replace(spec, eval_split=None, test_split=None)
    if spec.source == "auto":
        return split_files(spec, tuple(chain.from_iterable(SUFFIXES.values())))
    return split_files(spec, _reader_of(spec.source).suffixes)


def _splits_inside(spec: DataSpec) -> bool:
    """Tell whether the splits that were named stand in the very file, under their names."""
    named = [split for split in (spec.eval_split, spec.test_split) if split]
    path = Path(str(spec.path)).expanduser()
    if not named or spec.source not in ("auto", "jsonl") or suffix_of(path) != ".json" or not path.is_file():
        return False
    return set(named) <= json_table.splits_of(path, spec)


def _reader_of(source: str) -> Reader:
    return registry.READERS.get(source, lambda entry: isinstance(entry, Reader))


def read_splits(spec: DataSpec) -> dict[str, Table]:
    """Return the tables of train and of the splits that were named or found; notes on all of them are train's."""
    if spec.source == "hub":
        wanted = {"train": spec.train_split, "eval": spec.eval_split, "test": spec.test_split}
        return {name: _read_hub(spec, split) for name, split in wanted.items() if split}
    found, notes = files_of(spec)
    tables: dict[str, Table] = {}
    kinds: dict[str, None] = {}
    for name, parts in found.items():
        for path in parts:
            source = _kind(path, spec)
            kinds[source] = None
            table = _as_table(_reader_of(source).read(path, spec), path)
            if name in tables:
                tables[name].extend(table)
            else:
                tables[name] = table
    for name, part in tables["train"].others.items():
        if name not in tables:
            tables[name] = part
    if spec.source == "auto":
        notes.insert(0, f"read as {' and '.join(kinds)}, by its content; data=... if that is wrong")
    parts = found["train"]
    if len(parts) > 1:
        notes.append(f"train: {len(parts)} files, {parts[0].name} to {parts[-1].name}")
    tables["train"].notes = [*notes, *tables["train"].notes]
    return tables


def _as_table(rows: Table | list[Record], path: Path) -> Table:
    if isinstance(rows, Table):
        return rows
    placed = [Row(row, str(path), number, " row ") for number, row in enumerate(rows, 1)]
    return Table(placed, columns_of(placed))


def _kind(path: Path, spec: DataSpec) -> str:
    """Return the source that reads a file: the one that was asked for, or its kind by content."""
    if spec.source not in ("auto", *SUFFIXES):
        return spec.source
    kind = kind_of(path)
    if spec.source == "auto":
        return kind
    _refuse_other_kind(path, kind, spec.source)
    return spec.source


def _refuse_other_kind(path: Path, kind: str, source: str) -> None:
    """Raises ConfigError where a binary file is asked to be read as text, or the other way round."""
    binary = ("parquet", "arrow", "excel")
    if kind != source and (kind in binary or source in binary):
        raise ConfigError([f"data.source: {path} is not {source} but {kind}; give data={kind}"])


reader(*SUFFIXES["csv"])(read_csv)
reader(*SUFFIXES["conll"])(read_conll)
reader(*SUFFIXES["jsonl"])(read_jsonl)
reader(*SUFFIXES["squad"])(read_squad)


@reader(*SUFFIXES["text"])
def read_text(path: Path, spec: DataSpec) -> Table:
    """Return the whole text as one row; it is cut into blocks of the model's tokens later.

    A folder holds a folder for each class, with a file for each text.
    """
    if path.is_dir():
        return class_folders.read(path, spec)
    text, notes = files.text_of(path, spec.encoding)
    lines = [(number, line.split()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if lines and all(words[0].startswith(FASTTEXT) for _, words in lines):
        return _fasttext(path, lines, notes)
    return Table([Row({"text": text}, str(path), 1, WHOLE)], ["text"], notes=notes)


def _fasttext(path: Path, lines: Sequence[tuple[int, list[str]]], notes: list[str]) -> Table:
    """Return fastText's lines, `__label__a __label__b text`, as rows of text and label: lists where any has several."""
    rows = []
    for number, words in lines:
        names = list(takewhile(lambda word: word.startswith(FASTTEXT), words))
        label = [name.removeprefix(FASTTEXT) for name in names]
        rows.append(Row({"text": " ".join(words[len(names) :]), "label": label}, str(path), number))
    if all(len(row["label"]) == 1 for row in rows):
        for row in rows:
            row["label"] = row["label"][0]
    return Table(rows, ["text", "label"], notes=[*notes, f"lines of {path.name} begin with {FASTTEXT} and a class"])


@reader(*SUFFIXES["parquet"])
def read_parquet(path: Path, spec: DataSpec) -> Table:
    from datasets import Dataset

    try:
        # a cache that lasts would give back what the file held before: it knows files by their time alone
        with _quiet(), TemporaryDirectory() as cache:
            return _table(Dataset.from_parquet(str(path), cache_dir=cache, keep_in_memory=True), str(path))
    except Exception as error:
        raise ConfigError([f"{path}: not a Parquet file ({type(error).__name__}: {error})"]) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Show no progress bar for a file that lies here."""
    import datasets

    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


@reader(*SUFFIXES["excel"])
def read_excel(path: Path, spec: DataSpec) -> Table:
    """Return the rows of a workbook's first sheet; its first row that is not empty names the columns."""
    try:
        import openpyxl
        import pandas
    except ImportError as error:
        raise ConfigError(
            [f"data.path: {path} is an Excel workbook; save the sheet as CSV, or: pip install {error.name}"]
        ) from error
    try:
        with path.open("rb") as file:  # its name may end otherwise
            names = openpyxl.load_workbook(file, read_only=True).sheetnames
            sheet = pandas.read_excel(file, header=None, dtype=object, engine="openpyxl")
    except Exception as error:
        raise ConfigError([f"{path}: not an Excel workbook ({type(error).__name__}: {error})"]) from error
    cells = [[None if pandas.isna(v) else v for v in row] for row in sheet.itertuples(index=False)]
    filled = [(number, row) for number, row in enumerate(cells, 1) if any(v is not None for v in row)]
    if len(filled) < 2:
        raise ConfigError([f"data.path: {path} holds no row in its first sheet"])
    header = [f"Unnamed: {i}" if v is None else str(v).strip() for i, v in enumerate(filled[0][1])]
    rows = [Row(dict(zip(header, row, strict=True)), str(path), number, " row ") for number, row in filled[1:]]
    repeated = [name for name, count in Counter(header).items() if count > 1]
    notes = [f"the sheet '{names[0]}' of {path.name} is read, the first of {len(names)}"] if len(names) > 1 else []
    return Table(rows, list(dict.fromkeys(header)), notes=notes, repeated=repeated)


@reader(*SUFFIXES["arrow"])
def read_arrow(path: Path, spec: DataSpec) -> Table:
    from datasets import Dataset

    try:
        if path.is_file() and path.read_bytes()[: len(FILE_MARK)] == FILE_MARK:
            import pyarrow.feather  # pandas' Feather, and Arrow's own files; datasets writes streams

            return _table(Dataset(pyarrow.feather.read_table(str(path))), str(path))
        return _table(Dataset.load_from_disk(str(path)) if path.is_dir() else Dataset.from_file(str(path)), str(path))
    except Exception as error:
        raise ConfigError([f"data.path: {path} is not an Arrow table ({type(error).__name__}: {error})"]) from error


def _read_hub(spec: DataSpec, split: str) -> Table:
    from datasets import load_dataset

    try:
        found = load_dataset(str(spec.path), spec.config, split=split, revision=spec.revision)
        return _table(found, f"{spec.path} {split}")
    except Exception as error:
        problem = f"data.path: cannot load '{spec.path}' split '{split}' from the hub ({type(error).__name__}: {error})"
        raise ConfigError([problem]) from error


def hub_commit(spec: DataSpec) -> str:
    """Return the commit that the data set is at now, "" where the hub cannot be asked."""
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(str(spec.path), revision=spec.revision, timeout=HUB_WAIT_S).sha or ""
    except Exception:  # whatever a network does: the rows will tell
        return ""


def _table(found: Any, name: str) -> Table:
    """Return the rows of a `datasets` table, class numbers as the names of their classes; -1 stands for none."""
    from datasets import ClassLabel

    rows = [Row(cells, name, number, " row ") for number, cells in enumerate(found, 1)]
    class_names: dict[str, list[str]] = {}
    for column, feature in found.features.items():
        classes = feature if isinstance(feature, ClassLabel) else getattr(feature, "feature", None)
        if isinstance(classes, ClassLabel):
            class_names[column] = list(classes.names)
            for row in rows:
                row[column] = _named(row[column], classes.names)
    return Table(rows, list(found.column_names), class_names=class_names)


def _named(value: Any, names: Sequence[str]) -> Any:
    if isinstance(value, list):
        return [_named(v, names) for v in value]
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else None
