"""What a config field may hold: declared beside it, read from its type and metadata, and said in words."""

import ast
import inspect
import json
import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import Field, field, fields
from enum import Flag, auto
from itertools import pairwise
from types import ModuleType
from typing import Any, Union, get_args, get_origin, get_type_hints

from lorasweep.errors import did_you_mean


class Affects(Flag):
    """What changes with a key's value. Each key says so: caches, sharing, estimates and resuming go by it."""

    BASE = auto()
    """Model, task or data: trials that differ here need separate bases, and cannot share a pass."""
    TOKENS = auto()
    """The encoded examples, which are kept on disk for trials that agree here."""
    MEMORY = auto()
    """What a trial is estimated to need."""
    RESULT = auto()
    """What a trial computes: a checkpoint is for one value alone, and the card of an exported adapter shows it."""
    STUDY = auto()
    """What a study asks: settled once it has begun."""


def setting(default: Any, *, affects: Affects, **rules: Any) -> Any:
    """Return a field of a section; its type says what it takes, and `rules` what of that.

    A default that took the place of another one which did the same names that as `earlier`: what was trained with it
    goes on.
    """
    return field(default=default, metadata={"affects": affects, **rules})


def ranged(
    default: Any, low: float, high: float = math.inf, *, affects: Affects, above: bool = False, word: str | None = None
) -> Any:
    """Return a field that must lie in [low, high], or in (low, high] with `above`; None passes where it is allowed, and
    so does `word`.
    """
    return setting(default, affects=affects, range=(low, high, above), **({"word": word} if word else {}))


def one_of(default: Any, *options: Any, affects: Affects) -> Any:
    """Return a field that takes one of `options`."""
    return setting(default, affects=affects, options=options)


def affects(setting: Field[Any]) -> Affects:
    """Return what a field affects. Raises KeyError for one that does not say."""
    return setting.metadata["affects"]


def texts_below_fields(module: ModuleType) -> dict[tuple[str, str], str]:
    """Return (class, field) -> the string that stands under the field in the module's source."""
    texts = {}
    for node in ast.parse(inspect.getsource(module)).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for line, below in pairwise(node.body):
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                told = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
                value = below.value.value if told else ""  # type: ignore[attr-defined]
                texts[node.name, line.target.id] = " ".join(str(value).split())
    return texts


def allowed(hint: Any, metadata: Mapping[str, Any]) -> str:
    """Return what a field takes, in words: its options, or its type with the range."""
    kind = _kind(hint, metadata)
    if "each" in metadata:
        return f"a list, each one of {', '.join(metadata['each'])}{' or null' if type(None) in get_args(hint) else ''}"
    if "range" not in metadata:
        return kind
    low, high, above = metadata["range"]
    return f"{kind}, {'above' if above else 'from'} {_digits(low)}{'' if math.isinf(high) else f' to {_digits(high)}'}"


def _digits(number: float) -> str:
    """Return a number as one would type it: 1000000, 0.05."""
    return str(int(number)) if number == int(number) and abs(number) < 2**53 else f"{number:g}"


def section(cls: type, values: Mapping[str, Any], name: str, known_keys: Sequence[str], problems: list[str]) -> Any:
    """Return an instance of one section; add what is wrong with it to `problems`."""
    hints = get_type_hints(cls)
    known = {f.name: f for f in fields(cls)}
    kept: dict[str, Any] = {}
    bad = len(problems)
    for key, value in values.items():
        path = f"{name}.{key}"
        if key not in known:
            problems.append(f"{path}: no such key{did_you_mean(path, known_keys)}")
            continue
        try:
            kept[key] = _typed(value, hints[key])
        except TypeError:
            problems.append(f"{path}: must be {_kind(hints[key], known[key].metadata)}, got {_written(value)}")
            continue
        problem = _out_of_range(kept[key], known[key].metadata, type(None) in get_args(hints[key]))
        if problem:
            problems.append(f"{path}: {problem}")
    if len(problems) > bad:
        return None
    section = cls(**kept)
    problems += getattr(section, "problems", list)()
    return section


def _typed(value: Any, hint: Any) -> Any:
    """Return `value` as the hinted type. Raises TypeError where that would change its meaning."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        for option in sorted(get_args(hint), key=lambda o: o is str):
            try:
                return _typed(value, option)
            except TypeError:
                continue
        raise TypeError
    if hint is type(None):
        ok = value is None
    elif origin is list:
        if not isinstance(value, list | tuple):
            raise TypeError
        return [_typed(v, get_args(hint)[0]) for v in value]
    elif origin is dict:
        if not isinstance(value, dict):
            raise TypeError
        return {str(k): _typed(v, get_args(hint)[1]) for k, v in value.items()}
    elif hint is float:
        ok = isinstance(value, int | float) and not isinstance(value, bool)
        value = float(value) if ok else value
    elif hint is int:
        ok = isinstance(value, int) and not isinstance(value, bool)
    else:
        ok = isinstance(value, hint)
    if not ok:
        raise TypeError
    return value


def _kind(hint: Any, metadata: Mapping[str, Any]) -> str:
    """Return what a field takes, in words: its options where it has some."""
    if "options" in metadata:
        return _options(metadata, type(None) in get_args(hint))
    return _type_name(hint).replace("a string", metadata.get("word", "a string"))


def _options(metadata: Mapping[str, Any], optional: bool) -> str:
    return f"one of {', '.join(map(str, metadata['options']))}{' or null' if optional else ''}"


def _written(value: Any) -> str:
    """Return a value as YAML has it."""
    return json.dumps(value) if value is None or isinstance(value, bool) else repr(value)


def _type_name(hint: Any) -> str:
    names = {
        "bool": "true or false",
        "int": "a whole number",
        "float": "a number",
        "str": "a string",
        "NoneType": "null",
    }
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_type_name(o) for o in get_args(hint))
    if get_origin(hint) is list:
        return f"a list, each {_type_name(get_args(hint)[0])}"
    if get_origin(hint) is dict:
        return f"a mapping of names, each to {_type_name(get_args(hint)[1])}"
    return names.get(hint.__name__, hint.__name__)


NO_NULL = "must not hold a null byte"


def _not_among(options: Sequence[str], value: str) -> str:
    near = did_you_mean(value, list(options)).partition("; known")[0]
    return f"each must be one of {', '.join(options)}, got '{value}'{near}"


def _holds_null(value: Any) -> bool:
    """Return whether a string in the value has a null byte, which no file name and no database takes."""
    if isinstance(value, dict):
        return _holds_null([*value, *value.values()])
    return any(map(_holds_null, value)) if isinstance(value, list) else isinstance(value, str) and "\0" in value


def _out_of_range(value: Any, metadata: Mapping[str, Any], optional: bool) -> str | None:
    if _holds_null(value):
        return f"{NO_NULL}, got {value!r}"
    if value is None or value == metadata.get("word", ...):
        return None
    if "each" in metadata:
        return next((_not_among(metadata["each"], v) for v in value if v not in metadata["each"]), None)
    if "options" in metadata and value not in metadata["options"]:
        near = did_you_mean(str(value), [str(o) for o in metadata["options"]]).partition("; known")[0]
        return f"must be {_options(metadata, optional)}, got '{value}'{near}"
    if "range" in metadata:
        low, high, above = metadata["range"]
        if isinstance(value, str):
            return f"must be {metadata['word']} or a number from {_digits(low)}, got '{value}'"
        inside = (value > low if above else value >= low) and value <= high
        if not inside or not math.isfinite(value):
            lower = f"above {_digits(low)}" if above else f"at least {_digits(low)}"
            rule = lower if math.isinf(high) else f"between {_digits(low)} and {_digits(high)}"
            if above and not math.isinf(high):
                rule = f"{lower} and at most {_digits(high)}"
            return f"must be {rule}, got {_digits(value) if math.isfinite(value) else value}"
    return None
