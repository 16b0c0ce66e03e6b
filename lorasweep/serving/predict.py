"""Answers of a study's best adapter on texts or a file, for every task type: a line for each input, or JSON lines."""

import csv
import io
import json
import sys
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lorasweep import tasks
from lorasweep.config.spec import DataSpec
from lorasweep.data.dataset import Record
from lorasweep.errors import ConfigError
from lorasweep.serving import winner
from lorasweep.serving.winner import Loaded
from lorasweep.tasks import task_state
from lorasweep.tasks.task import Answer, Batch, Example, Task

Given = str | Mapping[str, Any]
"""An input: a text, or fields by their own name or by the column of the training data."""


def load(folder: Path, *, trusted: bool = False, **task_keys: Any) -> Loaded:
    """Return a trial's adapter ready for `answers`: language models write text, whatever they were evaluated by.

    `task_keys` change keys of task_type.
    """
    answers_with = tasks.kind(task_state.settings(folder).task_type.name).answers_with
    return winner.load(folder, trusted=trusted, **answers_with, **task_keys)


# --- inputs ----------------------------------------------------------------------------------------------------------


def parsed(text: str) -> Given:
    """Return the fields of a JSON object, or the text itself."""
    if text.lstrip().startswith("{"):
        try:
            found = json.loads(text)
        except json.JSONDecodeError:
            return text
        return found if isinstance(found, dict) else text
    return text


def read(path: Path) -> list[Given]:
    """Return a file's inputs: JSON lines (texts or objects), a CSV with a header, or a text a line.

    Raises ConfigError for another kind of file and for a line that cannot be read.
    """
    if path.suffix not in (".jsonl", ".csv", ".txt"):
        raise ConfigError([f"--file: must end in .jsonl, .csv or .txt, got '{path}'"])
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise ConfigError([f"--file: there is no {path}"]) from error
    except UnicodeDecodeError as error:
        raise ConfigError([f"--file: {path} is no UTF-8 text ({error})"]) from error
    if path.suffix == ".csv":
        csv.field_size_limit(sys.maxsize)
        return list(csv.DictReader(io.StringIO(text, newline="")))
    lines = [(n, row) for n, row in enumerate(text.split("\n"), 1) if row.strip()]
    if path.suffix == ".txt":
        return [row.strip() for _, row in lines]
    out: list[Given] = []
    for number, row in lines:
        try:
            found = json.loads(row)
        except json.JSONDecodeError as error:
            raise ConfigError([f"{path}:{number}: broken JSON ({error.msg} at column {error.colno})"]) from None
        if not isinstance(found, str | dict):
            raise ConfigError([f"{path}:{number}: must be a string or an object, got {type(found).__name__}"])
        out.append(found)
    return out


def fields_of(task: Task, spec: DataSpec, given: Given, place: int) -> Record:
    """Return an input's fields under the task's own names. Raises ConfigError where one is missing or empty."""
    asked = task.fields(spec)
    must, may = asked.must, asked.may
    needs = "{" + ", ".join(f'"{n}": "..."' for n in must) + "}"
    if isinstance(given, str):
        if len(must) > 1:
            raise ConfigError([f"input {place}: {task.name} needs {' and '.join(must)}, as JSON: '{needs}'"])
        given = {must[0]: given}
    columns = task.columns(spec)
    found = {}
    for name in (*must, *may):
        keys = [name, columns.get(name, name), *(["text"] if name == must[0] else [])]
        value = next((given[k] for k in keys if given.get(k)), None)
        if value is not None:
            found[name] = value
    missing = [n for n in must if not str(found.get(n, "")).strip()]
    if missing:
        has = ", ".join(map(str, given)) or "nothing"
        raise ConfigError(
            [f"input {place}: has nothing in {' and '.join(missing)}; {task.name} needs {needs}, got {has}"]
        )
    return found


def examples(loaded: Loaded, found: Sequence[Record]) -> list[Example]:
    """Return the inputs as tokens, their row the place among the inputs. Raises ConfigError for one with no token."""
    out: list[Example] = []
    for row, fields in enumerate(found):
        made = loaded.task.encode_input(fields, loaded.tokenizer, loaded.spec.data)
        if not made:
            raise ConfigError([f"input {row + 1}: leaves no token to read"])
        out += [replace(e, row=row) for e in made]
    return out


# --- answers ---------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def answers(loaded: Loaded, given: Sequence[Given]) -> list[Answer]:
    """Return the answer to each input, in order."""
    task = loaded.task
    found = [fields_of(task, loaded.spec.data, g, place) for place, g in enumerate(given, 1)]
    batches = list(_batches(loaded, examples(loaded, found)))
    return task.answer(loaded.inner, batches, [task.blank(fields) for fields in found])


def _batches(loaded: Loaded, made: Sequence[Example]) -> Iterator[Batch]:
    """Yield the examples a batch at a time, those of one shape by length, so that little is padding."""
    device = next(loaded.inner.parameters()).device
    size = loaded.spec.train.eval_batch_size
    by_shape: dict[Hashable, list[Example]] = {}
    for example in sorted(made, key=len, reverse=True):
        by_shape.setdefault(loaded.task.shape(example), []).append(example)
    for alike in by_shape.values():
        for start in range(0, len(alike), size):
            yield loaded.task.collate([alike[start : start + size]], loaded.tokenizer.pad_token_id, device)
