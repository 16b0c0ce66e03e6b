"""What stands in a label column, to class names: one class a text, several, or numbers.

1, 1.0 and "1" are one class, and so are ' pos' and 'pos', True and true.
"""

import ast
import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

WHOLE = re.compile(r"([+-]?)(0|[1-9][0-9]*)(\.0*)?")
"""A whole number; 007 and the like are names."""

SEPARATORS = ("|", ";", ",")
MISSING = ("", "nan")
"""Texts that say there is no label."""

SHOWN = 3
Labels = Mapping[str, Sequence[Any]]
"""Split -> what stands in its label column."""


def read_labels(labels: Labels, problem_type: str) -> tuple[dict[str, list[Any]], list[str]]:
    """Return the class name of each label, a list of them where a text has several, or a number for a regression, None
    for no label; and notes on it.
    """
    if problem_type == "regression":
        return _each(labels, lambda v: None if is_missing(v) else number(v)), []
    values = list(chain.from_iterable(labels.values()))
    separator, notes = _several(values, problem_type)
    if separator is None:
        names, more = class_names(v for v in values if not is_missing(v))
        return _each(labels, lambda v: None if is_missing(v) else names[_key(v)]), more
    lists = _each(labels, lambda v: several_of(v, separator))
    names, more = class_names(chain.from_iterable(found or [] for found in chain.from_iterable(lists.values())))

    def named(found: list[Any] | None) -> list[str] | None:
        return None if found is None else list(dict.fromkeys(names[_key(v)] for v in found))

    return _each(lists, named), notes + more


def _each(labels: Labels, read: Callable[[Any], Any]) -> dict[str, list[Any]]:
    return {split: list(map(read, cells)) for split, cells in labels.items()}


def is_missing(value: Any) -> bool:
    """Tell whether a cell holds no label."""
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or (isinstance(value, str) and value.strip().casefold() in MISSING)


def number(value: Any) -> Any:
    """Return a number where the cell holds one, the decimal comma of many countries included; else the cell."""
    text = str(value).strip()
    if re.fullmatch(r"[+-]?\d+,\d+", text):
        text = text.replace(",", ".")
    try:
        return float(text)
    except ValueError:
        return value


def is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


# --- one class -------------------------------------------------------------------------------------------------------


def class_names(labels: Iterable[Any]) -> tuple[dict[str, str], list[str]]:
    """Return key -> name of all classes, and a note on spellings that are one class and on names that are nearly so."""
    spellings: dict[str, Counter[str]] = {}
    for label in labels:
        spellings.setdefault(_key(label), Counter())[str(label)] += 1
    whole = [k for k in spellings if WHOLE.fullmatch(k)]
    fractions = any(re.fullmatch(r"[+-]?\d+\.\d+", k) for k in spellings if k not in whole)
    names = {key: _name(key, found, fractions) for key, found in spellings.items()}
    notes = []
    joined = {names[k]: sorted(found) for k, found in spellings.items() if len(found) > 1}
    if joined:
        told = sorted(joined.items())[:SHOWN]
        some = "; ".join(f"{' and '.join(map(repr, found))} are '{name}'" for name, found in told)
        notes.append(f"labels written in several ways are one class: {some}")
    alike: dict[str, list[str]] = {}
    for name in names.values():
        alike.setdefault(re.sub(r"[\W_]+", "", name.casefold()) or name, []).append(name)
    near = [sorted(found) for found in alike.values() if len(found) > 1]
    if near:
        some = "; ".join(" and ".join(map(repr, found)) for found in near[:SHOWN])
        notes.append(f"classes whose names are nearly equal: {some}; each is a class of its own")
    return names, notes


def _key(label: Any) -> str:
    """Return what labels of one class have in common."""
    text = unicodedata.normalize("NFC", str(label)).strip(" \t\r\n\u00a0\u200b\ufeff")
    if text.casefold() in ("true", "false"):
        return text.casefold()
    found = WHOLE.fullmatch(text)
    return (found[1] if found[1] == "-" and found[2] != "0" else "") + found[2] if found else text


def _name(key: str, found: Counter[str], fractions: bool) -> str:
    """Return a class's name: as it is written, its whole number, or of true and True the more frequent."""
    written = {s.strip() for s in found}
    if key in ("true", "false"):
        return sorted(found.items(), key=lambda item: (-item[1], item[0]))[0][0].strip()
    if WHOLE.fullmatch(key) and fractions and key not in written:
        return min(written, key=len)
    return key


# --- several classes -------------------------------------------------------------------------------------------------


def _several(values: Sequence[Any], problem_type: str) -> tuple[str | None, list[str]]:
    """Return what divides the classes of a cell ("" for lists), None for one class a text; and a note."""
    if problem_type == "single_label":
        return None, []
    if any(isinstance(v, list | tuple) for v in values):
        return "", []
    texts = [v.strip() for v in values if isinstance(v, str) and v.strip()]
    if texts and all(listed(t) is not None for t in texts):
        return "", [f"labels such as {texts[0]!r} are read as lists of classes"]
    found = next((s for s in SEPARATORS if _divides(s, texts)), None)
    if found is not None:
        some = next(t for t in texts if found in t)
        keep = "" if problem_type == "multi_label" else "; task_type.problem_type=single_label keeps them whole"
        return found, [f"labels such as {some!r} are read as several classes divided by '{found}'{keep}"]
    if problem_type == "multi_label":
        everything = "".join(texts)
        return next((s for s in SEPARATORS if s in everything), "|"), []
    return None, []


def _divides(separator: str, texts: Sequence[str]) -> bool:
    """Tell whether cells with a separator are combinations of classes: each part stands alone or in another one too,
    and there are fewer parts than cells that differ.
    """
    cells = set(texts)
    together = [frozenset(parts_of(c, separator)) for c in cells if separator in c]
    alone = {c for c in cells if separator not in c}
    counts = Counter(chain.from_iterable(together))
    known = all(part in alone or n > 1 for part, n in counts.items())
    return bool(together) and known and len(alone | counts.keys()) < len(cells)


def parts_of(text: str, separator: str) -> list[str]:
    return [part.strip() for part in text.split(separator) if part.strip()]


def listed(text: str) -> list[Any] | None:
    """Return the list that a text writes out, as JSON or as Python does; None for another text."""
    if not (text.startswith("[") and text.endswith("]")):
        return None
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        return found if isinstance(found, list) else None
    bare = re.fullmatch(r"\[([\w\s.,'\"-]*)\]", text)  # numpy writes ['a' 'b'], some people [a, b]
    return [p.strip("'\"") for p in re.split(r"[,\s]+", bare[1]) if p.strip("'\"")] if bare else None


def several_of(value: Any, separator: str) -> list[Any] | None:
    """Return the classes of a cell; an empty one has none."""
    if isinstance(value, list | tuple):
        return [v for v in value if not is_missing(v)]
    if is_missing(value):
        return []
    text = str(value).strip()
    found = listed(text)
    if found is not None:
        return found
    return parts_of(text, separator) if separator else [text]


# --- a column a class ------------------------------------------------------------------------------------------------

ON = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False, "": False}


def marked(row: Mapping[str, Any], columns: Sequence[str]) -> list[str] | None:
    """Return the columns that hold a 1; None where one holds -1, which stands for not known.

    Raises ValueError for another value.
    """
    found = []
    for column in columns:
        value = row.get(column)
        key = "" if is_missing(value) else _key(value)
        if key == "-1":
            return None
        if key not in ON:
            raise ValueError(f"'{column}' must hold 0 or 1, got {value!r:.40}")
        if ON[key]:
            found.append(column)
    return found


def one_hot(columns: Mapping[str, Sequence[Any]]) -> list[str]:
    """Return the columns that hold nothing but 0 and 1, where there are at least two and each holds both."""
    found = []
    for name, values in columns.items():
        keys = {_key(v) for v in values if not is_missing(v)}
        if keys == {"0", "1"} and not any(is_missing(v) for v in values):
            found.append(name)
    return found if len(found) > 1 else []
