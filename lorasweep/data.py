"""A file, a hub data set or the built-in corpus to records, splits and a fingerprint. The owner of `datasets`.

A record is a dict of the task's own field names (text, label, prompt, ...), whatever the columns are called.
Pruning and choosing read `eval`; `test` is read once, after choosing.
"""

import csv
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from lorasweep import corpus
from lorasweep.errors import ConfigError, did_you_mean
from lorasweep.spec import DataSpec

Record = dict[str, Any]
SPLITS = ("train", "eval", "test")
SUFFIX = {"csv": ".csv", "jsonl": ".jsonl", "parquet": ".parquet"}


@dataclass(frozen=True)
class Data:
    splits: Mapping[str, Sequence[Record]]
    fingerprint: str
    """sha256 over every record of every split, in order: equal fingerprints mean equal data."""
    name: str
    notes: tuple[str, ...] = field(default=())
    """What was dropped or carved, for a person to read."""


@lru_cache(maxsize=4)
def _load_cached(spec_key: str, columns_key: str, task: str) -> Data:
    spec = DataSpec(**json.loads(spec_key))
    return _load(spec, json.loads(columns_key), task)


def load(spec: DataSpec, columns: Mapping[str, str], task: str) -> Data:
    """Return the records of all splits; the last few results are kept.

    `columns` maps the task's fields to column names. Raises ConfigError for a missing file, column or split, an
    unreadable row (with file and line) and an empty split.
    """
    return _load_cached(json.dumps(vars(spec), sort_keys=True), json.dumps(dict(columns), sort_keys=True), task)


def _load(spec: DataSpec, columns: Mapping[str, str], task: str) -> Data:
    if spec.source == "builtin":
        raw: dict[str, list[Record]] = {"train": _builtin(task)}
        columns = {name: name for name in raw["train"][0]}
    else:
        raw = _read_splits(spec)
    raw = {name: _rename(rows, columns, spec) for name, rows in raw.items()}
    notes = _carve(raw, spec)
    limits = {"train": spec.max_train_samples, "eval": spec.max_eval_samples, "test": spec.max_eval_samples}
    splits = {name: _at_most(raw[name], limits[name]) for name in SPLITS}
    empty = [f"data.{name}_split: the {name} split is empty" for name in SPLITS if not splits[name]]
    if empty:
        raise ConfigError(empty)
    name = "builtin" if spec.source == "builtin" else Path(str(spec.path)).name
    return Data(splits=splits, fingerprint=_fingerprint(splits), name=name, notes=tuple(notes))


def _builtin(task: str) -> list[Record]:
    views = {"SEQ_CLS": corpus.labelled, "CAUSAL_LM": corpus.topics}
    if task not in views:
        raise ConfigError(
            [f"data: the built-in corpus serves {', '.join(views)}, not {task}; give data=... and data.path="]
        )
    return views[task]()


# --- reading ---------------------------------------------------------------------------------------------------------


def _read_splits(spec: DataSpec) -> dict[str, list[Record]]:
    """Return the raw rows of train and of the splits that were named."""
    wanted = {"train": spec.train_split, "eval": spec.eval_split, "test": spec.test_split}
    named = {name: split for name, split in wanted.items() if split}
    if spec.source == "hub":
        return {name: _read_hub(spec, split) for name, split in named.items()}
    path = Path(str(spec.path)).expanduser()
    problems, files = [], {}
    for name, split in named.items():
        try:
            files[name] = _split_file(path, split, SUFFIX[spec.source], name)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    readers = {"csv": _read_csv, "jsonl": _read_jsonl, "parquet": _read_parquet}
    return {name: readers[spec.source](file) for name, file in files.items()}


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


def _read_csv(path: Path) -> list[Record]:
    try:
        with path.open(encoding="utf8", newline="") as file:
            reader = csv.DictReader(file)
            rows = []
            for row in reader:
                if None in row or None in row.values():
                    raise ConfigError([f"{path}:{reader.line_num}: the row has not as many cells as the header"])
                rows.append(dict(row))
            return rows
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError([f"{path}: not a UTF-8 CSV file ({error})"]) from error


def _read_jsonl(path: Path) -> list[Record]:
    rows, problems = [], []
    for number, line in enumerate(path.read_text(encoding="utf8").splitlines(), 1):
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


def _read_parquet(path: Path) -> list[Record]:
    from datasets import Dataset

    try:
        return list(Dataset.from_parquet(str(path)))
    except Exception as error:
        raise ConfigError([f"{path}: not a Parquet file ({type(error).__name__}: {error})"]) from error


def _read_hub(spec: DataSpec, split: str) -> list[Record]:
    from datasets import load_dataset

    try:
        return list(load_dataset(str(spec.path), spec.config, split=split))
    except Exception as error:
        problem = f"data.path: cannot load '{spec.path}' split '{split}' from the hub ({type(error).__name__}: {error})"
        raise ConfigError([problem]) from error


# --- splits ----------------------------------------------------------------------------------------------------------


def _rename(rows: Sequence[Record], columns: Mapping[str, str], spec: DataSpec) -> list[Record]:
    if not rows:
        return []
    present = list(rows[0])
    missing = [(f, c) for f, c in columns.items() if c not in rows[0]]
    if missing:
        raise ConfigError(
            [
                f"data.{name}_column: no column '{column}' in {spec.path}{did_you_mean(column, present)}; "
                f"it has {', '.join(present)}"
                for name, column in missing
            ]
        )
    out = []
    for number, row in enumerate(rows, 1):
        record = {name: row.get(column) for name, column in columns.items()}
        absent = [name for name, value in record.items() if value is None or value == ""]
        if absent:
            raise ConfigError([f"{spec.path}: row {number} has nothing in '{columns[absent[0]]}'"])
        out.append(record)
    return out


def _carve(raw: dict[str, list[Record]], spec: DataSpec) -> list[str]:
    """Take the splits that were not named out of train, by hash; return what was done."""
    notes = []
    start = 0.0
    train = raw["train"]
    for name, fraction in (("eval", spec.eval_fraction), ("test", spec.test_fraction)):
        if name in raw:
            continue
        low, high = start, start + fraction
        raw[name] = [r for r in train if low <= _place(r) < high]
        start = high
        notes.append(f"{name}: {len(raw[name])} rows carved from train by a hash of the text ({fraction:.0%})")
    raw["train"] = [r for r in train if _place(r) >= start]
    return notes


def _place(record: Record) -> float:
    """Return a number in [0, 1) that depends on the record's normalised text alone, never on its label."""
    texts = [v for k, v in sorted(record.items()) if k not in ("label", "completion") and isinstance(v, str)]
    normal = " ".join(" ".join(texts).casefold().split())
    return int.from_bytes(hashlib.sha256(normal.encode()).digest()[:7]) / 2**56


def _at_most(rows: list[Record], limit: int | None) -> list[Record]:
    """Return at most `limit` rows, those whose hash is smallest, in their own order."""
    if limit is None or len(rows) <= limit:
        return rows
    ranks = sorted(range(len(rows)), key=lambda i: (hashlib.sha256(repr(rows[i]).encode()).digest(), i))
    return [rows[i] for i in sorted(ranks[:limit])]


def _fingerprint(splits: Mapping[str, Iterable[Record]]) -> str:
    digest = hashlib.sha256()
    for name in SPLITS:
        for record in splits[name]:
            digest.update(json.dumps([name, record], sort_keys=True, default=str).encode())
    return digest.hexdigest()
