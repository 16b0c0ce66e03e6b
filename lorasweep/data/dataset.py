"""A file, a hub data set or the built-in corpus to records, splits and a fingerprint.

A record is a dict of the task's own field names (text, label, prompt, ...), whatever the columns are called.
Pruning and choosing read `eval`; `test` is read once, after choosing.
"""

import hashlib
import json
import platform
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any

from lorasweep.config.spec import DataSpec
from lorasweep.data import builtin, labels, readers, text_blocks, word_rows
from lorasweep.data.carve import by_what, carve, classes_of
from lorasweep.data.columns import USUAL, Columns, find_columns, same_name, value_at
from lorasweep.data.fields import record_of, words_of
from lorasweep.data.split_files import stamp
from lorasweep.data.table import WHOLE, Record, Row, Table, place_of
from lorasweep.errors import ConfigError

SPLITS = ("train", "eval", "test")

FEW = 0.01
"""Share of rows that may be left out because nothing can be learned of them; one always may."""

SHOWN = 10
"""Most problems of single rows that a message lists."""

CACHED = 4
AROUND = 2
"""Tokens of a block that begin and end it."""

CLASS_FIELDS = ("label", "tags")
"""Fields whose classes all carved splits should have."""


@dataclass(frozen=True)
class Data:
    splits: Mapping[str, Sequence[Record]]
    fingerprint: str
    """sha256 over every record of every split, in order, and the labels: equal fingerprints mean equal data."""
    name: str
    notes: tuple[str, ...] = field(default=())
    """What was dropped or carved, for a person to read."""
    labels: tuple[Any, ...] = field(default=())
    """Labels or tags of the train split before max_train_samples, each once: a smaller sample trains the same head."""
    class_names: tuple[str, ...] = field(default=())
    """Names of the classes in the order of the file's own numbers, where it holds them."""
    found: Mapping[str, Any] = field(default_factory=dict)
    """Keys of data.* that were left open, with what the data say."""
    skipped: Mapping[str, int] = field(default_factory=dict)
    """Split -> rows left out because nothing can be learned of them."""

    @property
    def eval_fingerprint(self) -> str:
        """sha256 over the records of the eval split: metrics of trials that share it are of the same rows."""
        return _fingerprint({"eval": self.splits["eval"]}, ())

    @property
    def test_fingerprint(self) -> str:
        """The same of the test split."""
        return _fingerprint({"test": self.splits["test"]}, ())


_cache: OrderedDict[str, Data] = OrderedDict()


def load(
    spec: DataSpec,
    columns: Mapping[str, str],
    view: str = "",
    problem_type: str = "auto",
    count: text_blocks.Count = text_blocks.estimated,
    tokenizer: str = "",
) -> Data:
    """Return the records of all splits; the last few results are kept, as long as the files are the same.

    `columns` maps the task's fields to column names; `view` is the task's of the built-in corpus. `count` tells
    the tokens of a text, by the tokenizer of that name.
    Raises ConfigError for a missing file, column or split, too many unreadable rows (with file and line) and an empty
    split.
    """
    key = json.dumps([vars(spec), dict(columns), view, problem_type, tokenizer, files_seen(spec)], sort_keys=True)
    if key not in _cache:
        _cache[key] = _load(spec, columns, view, problem_type, count)
    _cache.move_to_end(key)
    while len(_cache) > CACHED:
        _cache.popitem(last=False)
    return _cache[key]


def files_seen(spec: DataSpec) -> list[list[Any]]:
    """Return path, size and times of change of each file that is read, the commit of a hub data set, or the version of
    Python, whose documentation the built-in corpus is: what tells that the data have changed. [] where nobody knows.
    """
    if spec.source == "builtin":
        return [["builtin", platform.python_version()]]
    if spec.source == "hub":
        commit = readers.hub_commit(spec)
        return [[str(spec.path), commit]] if commit else []
    return [list(seen) for seen in stamp(readers.files_of(spec)[0])]


def _load(spec: DataSpec, asked: Mapping[str, str], view: str, problem_type: str, count: text_blocks.Count) -> Data:
    if spec.source == "builtin":
        rows = _builtin(view)
        tables = {"train": Table([Row(r) for r in rows], list(rows[0]))}
        asked = {name: name for name in rows[0]}
    else:
        tables = readers.read_splits(spec)
        if "label" not in asked:
            _cut_running_text(tables, spec, count)
        if "tags" in asked:
            tables = word_rows.sentences(tables, asked["tokens"], asked["tags"])
    tables, spec = _with_label_columns(tables, asked, spec)
    columns = find_columns(asked, tables["train"], spec)
    notes = [*_table_notes(tables, columns), *columns.notes] if spec.source != "builtin" else []
    raw, broken = _records(tables, columns, spec, notes)
    notes += _settle_labels(raw, broken, problem_type)
    skipped = _leave_out(raw, broken, tables, spec, notes)
    classes = next((f for f in CLASS_FIELDS if f in columns.by_field), "")
    notes += _carve(raw, spec, "" if problem_type == "regression" else classes)
    limits = {"train": spec.max_train_samples, "eval": spec.max_eval_samples, "test": spec.max_eval_samples}
    splits = {name: _at_most(raw[name], limits[name]) for name in SPLITS}
    empty = [name for name in SPLITS if not splits[name]]
    if empty:
        raise ConfigError(_why_empty(empty, raw["train"], columns, classes))
    found = columns.changed(spec) if spec.source != "builtin" else {}
    return Data(
        splits=splits,
        fingerprint=_fingerprint(splits, train_labels := _labels(raw["train"])),
        name="builtin" if spec.source == "builtin" else Path(str(spec.path)).name,
        notes=tuple(dict.fromkeys(notes)),
        labels=train_labels,
        class_names=tuple(_class_names(tables["train"], columns, spec)),
        found=found | ({"label_columns": spec.label_columns} if spec.label_columns else {}),
        skipped=skipped,
    )


def _why_empty(empty: Sequence[str], train: Sequence[Record], columns: Columns, classes: str) -> list[str]:
    """Return a problem for splits that are empty: all at once where it is for what stands in the label column."""
    found = Counter(chain.from_iterable(classes_of(record, classes) for record in train))
    if classes and found and max(found.values()) == 1:
        return [
            f"data.{classes}_column: '{columns.by_field[classes]}' holds another class in each of {len(train)} rows, "
            "as the name of a row would; name the column of the classes"
        ]
    return [f"data.{name}_split: the {name} split is empty" for name in empty]


def _builtin(view: str) -> list[Record]:
    if view not in builtin.VIEWS:
        raise ConfigError(["data: the built-in corpus has nothing for this task; give data=... and data.path="])
    return builtin.rows(view)


# --- tables ----------------------------------------------------------------------------------------------------------


def _cut_running_text(tables: Mapping[str, Table], spec: DataSpec, count: text_blocks.Count) -> None:
    """Put blocks in place of the whole text of a file."""
    for table in tables.values():
        if not all(row.unit == WHOLE for row in table.rows):
            continue
        whole, table.rows = table.rows, []
        for row in whole:
            limit = spec.max_tokens or text_blocks.fair_length(row["text"], count)
            found = text_blocks.blocks(row["text"], max(1, limit - AROUND), count)
            table.rows += [
                Row({"text": block}, row.file, number, " block ", goes_on=number < len(found))
                for number, block in enumerate(found, 1)
            ]


def _with_label_columns(
    tables: dict[str, Table], asked: Mapping[str, str], spec: DataSpec
) -> tuple[dict[str, Table], DataSpec]:
    """Return the tables with a column of lists in place of label_columns, found where no label was named."""
    train = tables["train"]
    if "label" not in asked or spec.source == "builtin":
        return tables, spec
    if not spec.label_columns:
        if asked["label"] != "label" or find_label(train):
            return tables, spec
        found = labels.one_hot({column: train.cells_of(column) for column in train.columns})
        if not found:
            return tables, spec
        spec = replace(spec, label_columns=found)
    missing = [c for c in spec.label_columns or [] if c not in train.columns]
    if missing:
        raise ConfigError([f"data.label_columns: no column '{missing[0]}'; it has {', '.join(train.columns)}"])
    for table in tables.values():
        for row in table.rows:
            row[asked["label"]] = None
        table.columns = [*table.columns, *[c for c in [asked["label"]] if c not in table.columns]]
    return tables, spec


def find_label(table: Table) -> bool:
    """Tell whether a table has a column with a usual name of labels."""
    return any(same_name(word, table.columns) for word in USUAL["label"])


def _table_notes(tables: Mapping[str, Table], columns: Columns) -> list[str]:
    """Return notes on the files. Raises ConfigError where a column that is read stands in one twice."""
    problems = []
    for name, table in tables.items():
        for word, column in columns.by_field.items():
            if column in table.repeated:
                problems.append(
                    f"data.{word}_column: two columns of {name} are called '{column}'; give one of them another name"
                )
    if problems:
        raise ConfigError(problems)
    repeated = set(chain.from_iterable(table.repeated for table in tables.values()))
    notes = list(chain.from_iterable(table.notes for table in tables.values()))
    return notes + ([f"two columns are called {', '.join(sorted(repeated))}; neither is read"] if repeated else [])


def _class_names(table: Table, columns: Columns, spec: DataSpec) -> list[str]:
    if spec.label_columns:
        return spec.label_columns
    column = columns.by_field.get("label") or columns.by_field.get("tags", "")
    return table.class_names.get(column, [])


# --- rows ------------------------------------------------------------------------------------------------------------


def _records(
    tables: Mapping[str, Table], columns: Columns, spec: DataSpec, notes: list[str]
) -> tuple[dict[str, list[Record]], dict[str, list[str]]]:
    """Return the records of each split, and what is wrong with the rows that are none. A split that was found by its
    name and has no labels is left out.
    """
    raw: dict[str, list[Record]] = {}
    broken: dict[str, list[str]] = {}
    named = {"train": spec.train_split, "eval": spec.eval_split, "test": spec.test_split}
    for name, table in tables.items():
        missing = [c for c in columns.by_field.values() if c not in table.columns and "." not in c]
        if missing and table.rows and spec.source != "builtin":
            if not named[name]:
                notes.append(f"{name}: the file found has no column '{missing[0]}' and is not read")
                continue
            raise ConfigError([f"data.{name}_split: no column '{missing[0]}'; it has {', '.join(table.columns)}"])
        raw[name], broken[name] = [], list(table.broken)
        unseen = blank = 0
        for number, row in enumerate(table.rows, 1):
            if spec.source == "builtin":
                raw[name].append(row)
                continue
            record, wrong = record_of(row, columns.by_field, spec)
            if wrong:
                broken[name].append(f"{place_of(row, number)}: {wrong}")
                continue
            if "tags" in record:
                unseen += len(words_of(value_at(row, columns.by_field["tokens"]))) - len(record["tokens"])
                blank += not record["tokens"]
            if record.get("tokens") != []:
                raw[name].append(record)
        if unseen:
            rows = f", and with them {blank} rows" if blank else ""
            notes.append(f"{name}: {unseen} words without a visible character are left out{rows}")
    return raw, broken


def _settle_labels(raw: dict[str, list[Record]], broken: dict[str, list[str]], problem_type: str) -> list[str]:
    """Put class names in place of what stands in the label column; a record without a label is broken."""
    train = raw["train"]
    if not train or "label" not in train[0]:
        return []
    cells = {split: list(map(itemgetter("label"), rows)) for split, rows in raw.items()}
    named, notes = labels.read_labels(cells, problem_type)
    for split, rows in raw.items():
        kept: list[Record] = []
        for number, (record, label) in enumerate(zip(rows, named[split], strict=True), 1):
            if label is None:
                broken[split].append(f"{place_of(record, number)}: has no label")
            elif problem_type == "regression" and not labels.is_finite(label):
                broken[split].append(f"{place_of(record, number)}: the label must be a finite number, got {label!r}")
            else:
                record["label"] = label
                kept.append(record)
        raw[split] = kept
    return notes


def _leave_out(
    raw: dict[str, list[Record]],
    broken: Mapping[str, list[str]],
    tables: Mapping[str, Table],
    spec: DataSpec,
    notes: list[str],
) -> dict[str, int]:
    """Return how many rows each split loses. Raises ConfigError where there are more than data.bad_rows allows."""
    problems: list[str] = []
    for split, wrong in broken.items():
        total = len(raw[split]) + len(wrong)
        few = {"auto": max(1, int(FEW * total)), "skip": total, "error": 0}[spec.bad_rows]
        if not wrong:
            continue
        if len(wrong) <= few and raw[split]:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            notes.append(f"{split}: {len(wrong)} of {total} rows left out: {'; '.join(wrong[:3])}{more}")
            continue
        if not raw[split] and split != "train" and not getattr(spec, f"{split}_split"):
            notes.append(f"{split}: the file found has no usable row and is not read")
            del raw[split]
            continue
        more = f"; and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        rule = "none may be" if spec.bad_rows == "error" else "more than 1 %"
        problems.append(
            f"data.bad_rows: {len(wrong)} of {total} rows of {split} cannot be used ({rule}); mend them, or leave them "
            f"out with data.bad_rows=skip: {'; '.join(wrong[:SHOWN])}{more}"
        )
    if problems:
        raise ConfigError(problems)
    return {split: len(wrong) for split, wrong in broken.items() if wrong}


# --- splits ----------------------------------------------------------------------------------------------------------


def _carve(raw: dict[str, list[Record]], spec: DataSpec, classes: str) -> list[str]:
    """Take the splits that were not named out of train; return what was done."""
    fractions = {"eval": spec.eval_fraction, "test": spec.test_fraction}
    open_ = {name: fraction for name, fraction in fractions.items() if name not in raw}
    if not open_:
        return []
    by = by_what(raw["train"])
    raw |= carve(raw["train"], open_, classes)
    alike = ", class by class" if classes else ""
    return [
        f"{name}: {len(raw[name])} rows carved from train by a hash of the {by}{alike} ({fraction:.0%})"
        for name, fraction in open_.items()
    ]


def _at_most(rows: list[Record], limit: int | None) -> list[Record]:
    """Return at most `limit` rows, those whose hash is smallest, in their own order."""
    if limit is None or len(rows) <= limit:
        return rows
    ranks = sorted(range(len(rows)), key=lambda i: (hashlib.sha256(repr(rows[i]).encode()).digest(), i))
    return [rows[i] for i in sorted(ranks[:limit])]


def _labels(records: Iterable[Record]) -> tuple[Any, ...]:
    found: dict[str, Any] = {}
    for record in records:
        for label in record.get("tags", [record["label"]] if "label" in record else []):
            found.setdefault(json.dumps(label, default=str), label)
    return tuple(found[k] for k in sorted(found))


def _fingerprint(splits: Mapping[str, Iterable[Record]], labels: Sequence[Any]) -> str:
    digest = hashlib.sha256(json.dumps(labels, default=str).encode() if labels else b"")
    for name, records in splits.items():
        for record in records:
            digest.update(json.dumps([name, record], sort_keys=True, default=str).encode())
    return digest.hexdigest()
