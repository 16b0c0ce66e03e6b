"""Answers of a study's best adapter on texts or a file, for every task type: a line for each input, or JSON lines."""

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lorasweep.config.spec import DataSpec
from lorasweep.data.dataset import Record
from lorasweep.errors import ConfigError
from lorasweep.serving import winner
from lorasweep.serving.winner import Loaded
from lorasweep.tasks import task_state
from lorasweep.tasks.feature_extraction import embeddings
from lorasweep.tasks.task import Batch, Example, Prediction, Task
from lorasweep.training import evaluation

Given = str | Mapping[str, Any]
"""An input: a text, or fields by their own name or by the column of the training data."""
Answer = dict[str, Any]
"""What JSON can hold."""
SHOWN = 8
"""Numbers of an embedding in a line for people."""
GENERATES = ("CAUSAL_LM", "SEQ_2_SEQ_LM")


def load(folder: Path) -> Loaded:
    """Return a trial's adapter ready for `answers`: language models write text, whatever they were evaluated by."""
    generating = {"generate": True, "generate_samples": None}
    name = task_state.settings(folder).task_type.name
    keys: dict[str, Any] = generating if name in GENERATES else {}
    return winner.load(folder, **keys)


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


def asked(task: Task, spec: DataSpec) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the fields that an input must have, and those that it may have."""
    columns = task.columns(spec)
    match task.name:
        case "SEQ_CLS":
            return ("text", "text_pair") if "text_pair" in columns else ("text",), ()
        case "TOKEN_CLS":
            return ("tokens",), ()
        case "QUESTION_ANS":
            return ("question", "context"), ()
        case "SEQ_2_SEQ_LM":
            return ("source",), ()
        case "CAUSAL_LM":
            return (next(n for n in ("messages", "prompt", "text") if n in columns),), ()
    first, second = ("text", "text_pair") if "text" in columns else ("anchor", "positive")
    return (first,), (second,)


def fields_of(task: Task, spec: DataSpec, given: Given, place: int) -> Record:
    """Return an input's fields under the task's own names. Raises ConfigError where one is missing or empty."""
    must, may = asked(task, spec)
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


def record(task: Task, found: Record) -> Record:
    """Return the fields as a record that `encode` takes: what would be learned is filled in, and nobody reads it."""
    match task.name:
        case "SEQ_CLS":
            kind = getattr(task, "kind", "")
            blank: Any = {"multi_label": [], "regression": 0.0}
            return found | {"label": blank[kind] if kind in blank else getattr(task, "classes")[0]}  # noqa: B009
        case "TOKEN_CLS":
            words = found["tokens"].split() if isinstance(found["tokens"], str) else list(map(str, found["tokens"]))
            return {"tokens": words, "tags": [getattr(task, "classes")[0]] * len(words)}  # noqa: B009
        case "QUESTION_ANS":
            return found | {"answers": []}
        case "SEQ_2_SEQ_LM":
            return found | {"target": "."}
        case "CAUSAL_LM" if "messages" in found:
            chat = found["messages"]
            turns = [{"role": "user", "content": chat}] if isinstance(chat, str) else list(chat)
            return {"messages": [*turns, {"role": "assistant", "content": "."}]}
        case "CAUSAL_LM":
            return {"prompt": found.get("prompt", found.get("text")), "completion": ""}
    second = "text_pair" if "text" in found else "positive"
    return {second: next(iter(found.values())), **found, "score": getattr(task, "low", 0.0)}


def examples(loaded: Loaded, found: Sequence[Record]) -> list[Example]:
    """Return the inputs as tokens, their row the place among the inputs. Raises ConfigError for one with no token."""
    task, spec = loaded.task, loaded.spec.data
    if task.name == "CAUSAL_LM":  # a prompt is never cut, and plain text goes on as it stands
        spec = replace(spec, max_tokens=1_000_000, prompt_suffix=spec.prompt_suffix if spec.prompt_column else "")
    out: list[Example] = []
    for row, fields in enumerate(found):
        made = task.encode([record(task, fields)], loaded.tokenizer, spec)
        if not made:
            raise ConfigError([f"input {row + 1}: leaves no token to read"])
        if task.name == "FEATURE_EXTRACTION" and len(fields) == 1:
            made = [replace(e, target=([], e.target[1])) for e in made]
        out += [replace(e, row=row) for e in made]
    _check_room(loaded, out)
    return out


def _check_room(loaded: Loaded, made: Sequence[Example]) -> None:
    """Raises ConfigError where a prompt and what is written after it are longer than the model reads."""
    room = getattr(loaded.inner.config, "max_position_embeddings", None)
    if loaded.task.name != "CAUSAL_LM" or room is None:
        return
    more = loaded.spec.task_type.max_new_tokens
    long = [e for e in made if len(e.info[0]) + more > room]
    if long:
        raise ConfigError(
            [
                f"input {e.row + 1}: has {len(e.info[0])} tokens, and {more} are written; the model reads {room}"
                for e in long
            ]
        )


# --- answers ---------------------------------------------------------------------------------------------------------


def answers(loaded: Loaded, given: Sequence[Given]) -> list[Answer]:
    """Return the answer to each input, in order."""
    task = loaded.task
    found = [fields_of(task, loaded.spec.data, g, place) for place, g in enumerate(given, 1)]
    made = examples(loaded, found)
    pad_id = loaded.tokenizer.pad_token_id
    if task.name == "SEQ_CLS":
        return [a for batch in _batches(loaded, made) for a in _classes(loaded, batch)]
    if task.name == "FEATURE_EXTRACTION":
        alone, pairs = ([e for e in made if bool(e.target[0]) == paired] for paired in (False, True))
        by_row = {
            row: a
            for part in (alone, pairs)
            for batch in _batches(loaded, part)
            for row, a in zip(batch.rows, _vectors(loaded, batch), strict=True)
        }
        return [by_row[row] for row in range(len(found))]
    predictions = evaluation.predict(loaded.inner, task, made, loaded.spec.train, pad_id)
    return _told(task, [record(task, fields) for fields in found], predictions)


def _batches(loaded: Loaded, made: Sequence[Example]) -> Iterator[Batch]:
    """Yield the examples in order, a batch at a time."""
    device = next(loaded.inner.parameters()).device
    size = loaded.spec.train.eval_batch_size
    for start in range(0, len(made), size):
        yield loaded.task.collate([made[start : start + size]], loaded.tokenizer.pad_token_id, device)


@torch.inference_mode()
def _classes(loaded: Loaded, batch: Batch) -> list[Answer]:
    """Return the class of each row with its probability, the classes above one half, or the number."""
    logits_BC = loaded.inner(**batch.inputs).logits.float()
    kind, names = getattr(loaded.task, "kind", ""), getattr(loaded.task, "classes", [])
    if kind == "regression":
        return [{"value": v} for v in logits_BC[:, 0].tolist()]
    shares_BC = logits_BC.sigmoid() if kind == "multi_label" else logits_BC.softmax(-1)
    out: list[Answer] = []
    for shares in shares_BC.tolist():
        by_name = dict(zip(names, shares, strict=True))
        if kind == "multi_label":
            out.append({"labels": [n for n, p in by_name.items() if p > 0.5], "probabilities": by_name})
        else:
            best = max(by_name, key=by_name.__getitem__)
            out.append({"label": best, "probability": by_name[best], "probabilities": by_name})
    return out


@torch.inference_mode()
def _vectors(loaded: Loaded, batch: Batch) -> list[Answer]:
    """Return the cosine of each pair, or the unit vector of each text."""
    vectors = embeddings(loaded.inner, batch)
    if len(vectors) > 1:
        return [{"similarity": v} for v in (vectors[0] * vectors[1]).sum(-1).tolist()]
    return [{"embedding": v} for v in vectors[0].tolist()]


def _told(task: Task, records: Sequence[Record], predictions: Sequence[Prediction]) -> list[Answer]:
    """Return a task's own predictions as answers."""
    if task.name == "QUESTION_ANS":
        texts = getattr(task, "answers")(predictions)  # noqa: B009
        return [{"answer": texts[row]} for row in range(len(records))]
    if task.name != "TOKEN_CLS":
        return [{"text": p["text"]} for p in predictions]
    out: list[Answer] = []
    for p in predictions:
        words = records[p["row"]]["tokens"]
        tags = dict(zip(p["words"], p["prediction"], strict=True))
        shown = task.readable(records[p["row"]], p)
        out.append({"tokens": words, "tags": [tags.get(i) for i in range(len(words))], "tagged": shown})
    return out


def line(answer: Answer) -> str:
    """Return an answer as one line for people."""
    if "label" in answer:
        return f"{answer['label']}\t{answer['probability']:.4f}"
    if "labels" in answer:
        return "|".join(f"{n} {answer['probabilities'][n]:.4f}" for n in answer["labels"]) or "(no class)"
    if "embedding" in answer:
        first = " ".join(f"{v:.4f}" for v in answer["embedding"][:SHOWN])
        return f"{len(answer['embedding'])} numbers: {first} ..."
    for name in ("value", "similarity"):
        if name in answer:
            return f"{answer[name]:.4f}"
    if "answer" in answer:
        return answer["answer"].replace("\n", "\\n") or "(no answer)"
    return str(answer.get("tagged", answer.get("text"))).replace("\n", "\\n")
