"""A file, a hub data set or the built-in corpus to records, splits and a fingerprint.

A record is a dict of the task's own field names (text, label, prompt, ...), whatever the columns are called.
Pruning and choosing read `eval`; `test` is read once, after choosing.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from lorasweep.config.spec import DataSpec
from lorasweep.data import builtin, readers
from lorasweep.data.readers import Record
from lorasweep.errors import ConfigError, did_you_mean

SPLITS = ("train", "eval", "test")
ANSWERS = ("label", "completion", "target", "positive", "negative", "score")
"""Fields that a record's place among carved splits must not depend on: they are what is learned."""

KEPT_TOGETHER = ("group", "context")
"""Fields that keep records in one split when eval or test is carved; the first that is there counts."""


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
        raw = readers.read_splits(spec)
    raw = {name: _rename(rows, columns, spec) for name, rows in raw.items()}
    notes = _carve(raw, spec)
    limits = {"train": spec.max_train_samples, "eval": spec.max_eval_samples, "test": spec.max_eval_samples}
    splits = {name: _at_most(raw[name], limits[name]) for name in SPLITS}
    empty = [f"data.{name}_split: the {name} split is empty" for name in SPLITS if not splits[name]]
    if empty:
        raise ConfigError(empty)
    name = "builtin" if spec.source == "builtin" else Path(str(spec.path)).name
    labels = _labels(raw["train"])
    return Data(splits=splits, fingerprint=_fingerprint(splits, labels), name=name, notes=tuple(notes), labels=labels)


def _builtin(task: str) -> list[Record]:
    views = {
        "SEQ_CLS": builtin.labelled,
        "CAUSAL_LM": builtin.topics,
        "SEQ_2_SEQ_LM": builtin.naming,
        "FEATURE_EXTRACTION": builtin.described,
        "TOKEN_CLS": builtin.python_tokens,
        "QUESTION_ANS": builtin.returned,
    }
    if task not in views:
        raise ConfigError(
            [f"data: the built-in corpus serves {', '.join(views)}, not {task}; give data=... and data.path="]
        )
    return views[task]()


# --- fields ----------------------------------------------------------------------------------------------------------


def _words(value: Any) -> list[str]:
    """Return a list of words. Raises ValueError for anything but a list of strings or numbers, or a string."""
    if isinstance(value, str):
        return value.split()
    if not isinstance(value, list) or not all(isinstance(v, str | int) for v in value):
        raise ValueError(f"must be a list of words, got {value!r:.80}")
    return [str(v) for v in value]


def _answers(value: Any) -> list[dict[str, Any]]:
    """Return a list of {"text", "start"}, empty texts left out. Raises ValueError for what is no list of answers."""
    if isinstance(value, dict) and isinstance(value.get("text"), list):
        starts = value.get("answer_start", value.get("start"))
        pairs = list(zip(value["text"], starts, strict=True)) if isinstance(starts, list) else [(None, None)]
    elif isinstance(value, list) and all(isinstance(a, dict) for a in value):
        pairs = [(a.get("text"), a.get("answer_start", a.get("start"))) for a in value]
    else:
        pairs = [(None, None)]
    if not all(isinstance(text, str) and type(start) is int for text, start in pairs):
        raise ValueError(
            f'must be {{"text": [...], "answer_start": [...]}} or a list of {{"text", "start"}}, got {value!r:.80}'
        )
    return [{"text": text, "start": start} for text, start in pairs if text]


def _messages(value: Any) -> list[dict[str, Any]]:
    """Return chat messages. Raises ValueError for anything but a list of them with an answer of the assistant."""
    if not isinstance(value, list) or not all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in value):
        raise ValueError(f'must be a list of {{"role", "content"}}, got {value!r:.80}')
    if not any(m["role"] == "assistant" for m in value):
        raise ValueError("has no message of the role assistant, so there is nothing to learn")
    return value


SHAPES: dict[str, Callable[[Any], Any]] = {
    "tokens": _words,
    "tags": _words,
    "answers": _answers,
    "messages": _messages,
}
"""Fields that are not plain values, and what brings the forms they come in to the one the tasks read."""


def _shaped(record: Record, columns: Mapping[str, str]) -> tuple[Record, list[str]]:
    """Return the record with its fields in the tasks' form, and what is wrong with it."""
    out, problems = dict(record), []
    for name in record.keys() & SHAPES.keys():
        try:
            out[name] = SHAPES[name](record[name])
        except ValueError as error:
            problems.append(f"'{columns[name]}' {error}")
    if not problems and "tags" in out and len(out["tags"]) != len(out["tokens"]):
        problems.append(f"{len(out['tokens'])} words in '{columns['tokens']}', {len(out['tags'])} tags")
    return out, problems


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
    out, problems = [], []
    for number, row in enumerate(rows, 1):
        record, wrong = _shaped({name: row.get(column) for name, column in columns.items()}, columns)
        absent = [n for n, v in record.items() if v is None or v == "" or (v == [] and n not in ("answers", "label"))]
        problems += [f"{spec.path}: row {number} has nothing in '{columns[n]}'" for n in absent[:1]]
        problems += [f"{spec.path}: row {number}: {w}" for w in wrong if not absent]
        out.append(record)
    if problems:
        more = [f"{spec.path}: and {len(problems) - 10} problems more"] if len(problems) > 10 else []
        raise ConfigError(problems[:10] + more)
    return out


def _carve(raw: dict[str, list[Record]], spec: DataSpec) -> list[str]:
    """Take the splits that were not named out of train, by hash; return what was done."""
    notes = []
    start = 0.0
    train = raw["train"]
    by = next((n for n in KEPT_TOGETHER if train and n in train[0]), "text")
    for name, fraction in (("eval", spec.eval_fraction), ("test", spec.test_fraction)):
        if name in raw:
            continue
        low, high = start, start + fraction
        raw[name] = [r for r in train if low <= _place(r) < high]
        start = high
        notes.append(f"{name}: {len(raw[name])} rows carved from train by a hash of the {by} ({fraction:.0%})")
    raw["train"] = [r for r in train if _place(r) >= start]
    return notes


def _place(record: Record) -> float:
    """Return a number in [0, 1) that depends on the record's normalised text alone, never on its label.

    Records of one group, or of one context where there is no group, get the same number.
    """
    kept = next((n for n in KEPT_TOGETHER if n in record), None)
    if kept:
        texts = [str(record[kept])]
    elif "tokens" in record:
        texts = record["tokens"]
    elif "messages" in record:
        texts = [str(m.get("content")) for m in record["messages"] if m.get("role") != "assistant"]
    else:
        texts = [v for k, v in sorted(record.items()) if k not in ANSWERS and isinstance(v, str)]
    normal = " ".join(" ".join(texts).casefold().split())
    return int.from_bytes(hashlib.sha256(normal.encode()).digest()[:7]) / 2**56


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
    for name in SPLITS:
        for record in splits[name]:
            digest.update(json.dumps([name, record], sort_keys=True, default=str).encode())
    return digest.hexdigest()
