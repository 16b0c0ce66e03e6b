"""JSON as people have it: a line a row, an array, rows under a key, columns, SQuAD's articles."""

import json
from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path
from typing import Any

from lorasweep.config.spec import DataSpec
from lorasweep.data import files
from lorasweep.data.table import USUAL_SPLITS, Row, Table, columns_of
from lorasweep.errors import ConfigError

ROWS_KEYS = ("data", "rows", "train", "examples", "items", "records", "instances", "dataset")
"""Where the rows stand in an object that holds several lists of objects."""


class Object(dict[str, Any]):
    """A JSON object that remembers which of its keys stood in it twice."""

    repeated: tuple[str, ...] = ()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    keys = [k for k, _ in pairs]
    twice = Object(found)
    twice.repeated = tuple(k for k in found if keys.count(k) > 1)
    return twice


DECODER = json.JSONDecoder(object_pairs_hook=_object)


def read_jsonl(path: Path, spec: DataSpec) -> Table:
    """Return the rows of a JSON or JSON lines file. Raises ConfigError where there are none."""
    text, notes = files.text_of(path, spec.encoding)
    values = _lines(text, path)
    if values is None:
        values = _values(text, path)
    table = Table(notes=notes)
    found = list(values)
    whole = [v for _, v in found if not isinstance(v, str)]
    if len(whole) == 1 and isinstance(whole[0], dict):
        rows = rows_under_key(whole[0], spec.train_split)
        if rows is not None:
            _take_items(table, rows, path, "")
            _take_other_splits(table, whole[0], path, spec)
            found = []
    for number, value in found:
        if isinstance(value, Broken):
            table.broken.append(value)
        elif isinstance(value, dict):
            table.rows.append(Row(value, str(path), number))
            table.repeated += [k for k in getattr(value, "repeated", ()) if k not in table.repeated]
        else:
            table.broken.append(f"{path}:{number}: must be a JSON object, got {type(value).__name__}")
    if not table.rows:
        raise ConfigError(table.broken[:10] or [f"data.path: {path} holds no JSON object"])
    table.columns = columns_of(table.rows)
    return table.bounded(path)


TOO_DEEP = "lists or objects stand in one another deeper than Python reads"


def _take_items(table: Table, rows: list[Any], path: Path, of: str) -> None:
    """Take the rows of a list into a table; `of` says which list it is, where there are several."""
    unit = f" {of} item " if of else " item "
    table.rows = [Row(r, str(path), n, unit) for n, r in enumerate(rows, 1) if isinstance(r, dict)]
    table.broken = [
        f"{path}:{unit}{n} is no object: {r!r:.60}" for n, r in enumerate(rows, 1) if not isinstance(r, dict)
    ]


def _take_other_splits(table: Table, whole: dict[str, Any], path: Path, spec: DataSpec) -> None:
    """Take the lists under the names of the other splits, as asked for or as usual, where train has one too."""
    if spec.train_split not in whole:
        return
    wanted = {"eval": spec.eval_split, "test": spec.test_split}
    for name, usual in USUAL_SPLITS.items():
        named = wanted[name]
        words = (named,) if named else usual
        word = next((w for w in words if isinstance(whole.get(w), list) and whole[w]), None)
        if word is None:
            continue
        other = Table()
        _take_items(other, whole[word], path, word)
        other.columns = columns_of(other.rows)
        table.others[name] = other
        table.notes.append(f"{name}: the {len(other.rows)} rows under '{word}' of {path.name}")


def splits_of(path: Path, spec: DataSpec) -> set[str]:
    """Return the names under which a JSON file holds lists, where train is one of them; nothing for another file."""
    try:
        value = json.loads(files.text_of(path, spec.encoding)[0])
    except ValueError:
        return set()
    if not isinstance(value, dict) or spec.train_split not in value:
        return set()
    return {key for key, part in value.items() if isinstance(part, list)}


class Broken(str):
    """What is wrong with a value that could not be read."""


def _lines(text: str, path: Path) -> Iterator[tuple[int, Any]] | None:
    """Return each line's value, or None where the lines are not values by themselves."""
    lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    first = lines[:20]
    whole = sum(_decodes(line) for _, line in first)
    if 2 * whole <= len(first) or (len(lines) == 1 and lines[0][1].lstrip().startswith("[")):
        return None
    return ((n, _value(line.strip(), f"{path}:{n}")) for n, line in lines)


def _decodes(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _value(line: str, place: str) -> Any:
    try:
        value, end = DECODER.raw_decode(line)
    except ValueError as error:
        where = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        return Broken(f"{place}: broken JSON ({getattr(error, 'msg', error)}{where})")
    except RecursionError:
        return Broken(f"{place}: {TOO_DEEP}")
    rest = line[end:].strip().strip(",")
    return Broken(f"{place}: broken JSON (more follows the object)") if rest else value


def _values(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    """Yield line and value of an array's items, or of values one after the other."""
    at, line, counted = 0, 1, 0
    opened = text.lstrip()[:1] == "["
    at = text.index("[") + 1 if opened else 0
    while True:
        while at < len(text) and (text[at].isspace() or text[at] == ","):
            at += 1
        line, counted = line + text.count("\n", counted, at), at
        if at >= len(text):
            if opened:
                yield line, Broken(f"{path}:{line}: broken JSON (the list is not closed)")
            return
        if opened and text[at] == "]":
            return
        try:
            value, at = DECODER.raw_decode(text, at)
        except ValueError as error:
            yield line, Broken(f"{path}:{line}: broken JSON ({getattr(error, 'msg', error)}); the rest is not read")
            return
        except RecursionError:
            yield line, Broken(f"{path}:{line}: {TOO_DEEP}; the rest is not read")
            return
        yield line, value


def rows_under_key(value: dict[str, Any], split: str) -> list[Any] | None:
    """Return the rows that an object holds: a list of objects under a key, or its columns; None for neither."""
    lists = {key: part for key, part in value.items() if _is_list_of_objects(part)}
    key = next((k for k in (split, *ROWS_KEYS) if k in lists), next(iter(lists)) if len(lists) == 1 else None)
    if key is not None and (len(value) == 1 or key in (split, *ROWS_KEYS) or len(lists[key]) > 1):
        return lists[key]
    if isinstance(value.get("columns"), list) and isinstance(value.get("data"), list):
        return [dict(zip(value["columns"], row, strict=False)) for row in value["data"]]
    parts = list(value.values())
    if len(parts) > 1 and all(isinstance(p, list) and len(p) == len(parts[0]) > 1 for p in parts):
        return [dict(zip(value, cells, strict=True)) for cells in zip(*parts, strict=True)]
    if len(parts) > 1 and all(isinstance(p, dict) and p.keys() == parts[0].keys() and len(p) > 1 for p in parts):
        if len(parts) > len(parts[0]):  # rows by their ids, not columns
            return parts
        return [dict(zip(value, map(itemgetter(i), parts), strict=True)) for i in parts[0]]
    return None


def _is_list_of_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(x, dict) for x in value[:20])


def is_squad(value: Any) -> bool:
    """Tell whether an object is a SQuAD file's: articles with paragraphs under `data`."""
    articles = value.get("data") if isinstance(value, dict) else None
    first = articles[0] if isinstance(articles, list) and articles else None
    return isinstance(first, dict) and "paragraphs" in first


def read_squad(path: Path, spec: DataSpec) -> Table:
    """Return one row a question of a SQuAD file (1.1 or 2.0); its group is the article's title."""
    text, notes = files.text_of(path, spec.encoding)
    try:
        articles = list(json.loads(text)["data"])
    except (json.JSONDecodeError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError([f"{path}: not a SQuAD file: JSON with a list 'data' ({error})"]) from error
    table = Table(notes=notes, columns=["question", "context", "answers", "group"])
    problems = []
    for number, article in enumerate(articles, 1):
        try:
            title = article.get("title") or f"article {number}"
            for paragraph in article["paragraphs"]:
                for qa in paragraph["qas"]:
                    answers = [] if qa.get("is_impossible") else qa["answers"]
                    row = {"question": qa["question"], "context": paragraph["context"], "answers": answers}
                    table.rows.append(Row(row | {"group": title}, str(path), len(table.rows) + 1, " question "))
        except (KeyError, TypeError, AttributeError) as error:
            wrong = f"{type(error).__name__}: {error}"
            problems.append(
                f"{path}: article {number} is not paragraphs with context, qas, question, answers ({wrong})"
            )
    if problems:
        raise ConfigError(problems[:10])
    return table
