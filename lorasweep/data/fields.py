"""A row's cells to a record in the form that the tasks read, or what is wrong with it."""

from collections.abc import Callable, Mapping
from typing import Any

from lorasweep.config.spec import DataSpec
from lorasweep.data import labels
from lorasweep.data.chats import messages_of, parsed, tools_of
from lorasweep.data.columns import value_at
from lorasweep.data.conll import visible
from lorasweep.data.table import Record, Row

MAY_BE_EMPTY = ("answers", "label", "tools", "system", "input")
"""Fields in which nothing may stand. What an empty label means is for the column as a whole to say."""

MAY_BE_BLANK = ("completion",)


def words_of(value: Any) -> list[str]:
    """Return a list of words. Raises ValueError for anything but a list of strings or numbers, or a string."""
    value = parsed(value)
    if isinstance(value, str):
        return value.split()
    if not isinstance(value, list) or not all(isinstance(v, str | int) for v in value):
        raise ValueError(f"must be a list of words, got {value!r:.80}")
    return [str(v) for v in value]


def answers_of(value: Any) -> list[dict[str, Any]]:
    """Return a list of {"text", "start"}, empty texts left out. Raises ValueError for what is no list of answers."""
    value = parsed(value)
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


def _placed(answer: str, context: Any) -> Any:
    """Return an answer that is plain text with its first place in the context, None where it is not in it."""
    if isinstance(parsed(answer), list | dict) or not answer.strip() or not isinstance(context, str):
        return answer
    start = context.find(answer.strip())
    return None if start < 0 else [{"text": answer.strip(), "start": start}]


SHAPES: dict[str, Callable[[Any], Any]] = {
    "tokens": words_of,
    "tags": words_of,
    "answers": answers_of,
    "messages": messages_of,
    "tools": tools_of,
}
"""Fields that are not plain values, and what brings the forms they come in to the one the tasks read."""


TEXTS = ("text", "text_pair", "source", "target", "prompt", "completion", "anchor", "positive", "question", "context")


def _one_text(value: Any) -> Any:
    """Return the text of a list that holds one alone. Raises ValueError for a list of several."""
    if not isinstance(value, list) or not value or not all(isinstance(v, str) for v in value):
        return value
    if len(value) > 1:
        raise ValueError(f"holds a list of {len(value)} texts; join them, or give a row for each")
    return value[0]


def record_of(row: Row, columns: Mapping[str, str], spec: DataSpec) -> tuple[Row, str | None]:
    """Return the row's fields in the tasks' form, and the first thing that is wrong with them."""
    out: Record = {name: value_at(row, column) for name, column in columns.items()}
    if isinstance(out.get("answers"), str):
        out["answers"] = _placed(out["answers"], out.get("context"))
        if out["answers"] is None:
            return row.like(out), f"'{columns['answers']}' does not stand in '{columns['context']}'"
    if isinstance(out.get("label"), dict):
        key = next(iter(out["label"]), "KEY")
        column = columns["label"]
        return row.like(out), f"'{column}' holds an object; say which part of it: data.label_column={column}.{key}"
    for name in out.keys() & set(TEXTS):
        try:
            out[name] = _one_text(out[name])
        except ValueError as error:
            return row.like(out), f"'{columns[name]}' {error}"
    for name in out.keys() & SHAPES.keys():
        if out[name] is None and name not in ("tools",):
            continue
        try:
            out[name] = SHAPES[name](out[name])
        except ValueError as error:
            return row.like(out), f"'{columns[name]}' {error}"
    if spec.label_columns and "label" in out:
        try:
            out["label"] = labels.marked(row, spec.label_columns)
        except ValueError as error:
            return row.like(out), str(error)
    absent = next((n for n, v in out.items() if n not in MAY_BE_EMPTY and _is_empty(v)), None)
    if absent:
        return row.like(out), f"has nothing in '{columns[absent]}'"
    if "score" in out:
        out["score"] = labels.number(out["score"])
        if not labels.is_finite(out["score"]):
            return row.like(out), f"'{columns['score']}' must be a finite number, got {out['score']!r:.40}"
    if "tags" in out and len(out["tags"]) != len(out["tokens"]):
        return row.like(out), f"{len(out['tokens'])} words in '{columns['tokens']}', {len(out['tags'])} tags"
    if "tags" in out:
        out["tokens"], out["tags"] = visible(out["tokens"], out["tags"])
    return row.like(_joined(out)), None


def _is_empty(value: Any) -> bool:
    if isinstance(value, float):
        return value != value
    return value is None or value == [] or (isinstance(value, str) and not value.strip())


def _joined(record: Record) -> Record:
    """Return the record with the fields that belong to others put into them: Alpaca's input, a chat's system text."""
    more = record.pop("input", None)
    if more is not None and str(more).strip():
        record["prompt"] = f"{record['prompt']}\n{more}"
    system = record.pop("system", None)
    if system and isinstance(system, str) and record["messages"][0]["role"] != "system":
        record["messages"] = [{"role": "system", "content": system}, *record["messages"]]
    if record.get("tools", ...) is None:
        del record["tools"]
    return record
