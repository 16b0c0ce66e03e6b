"""A dimension of a search space: one key that varies, as Hydra's sweep syntax or a sweep file's mapping tells it."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, make_dataclass, replace
from decimal import Decimal
from functools import cache
from random import shuffle
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from hydra.core.override_parser.types import (
    ChoiceSweep,
    Glob,
    IntervalSweep,
    Override,
    QuotedString,
    RangeSweep,
    Sweep,
)

from lorasweep.config import fields as field_rules
from lorasweep.config import spec
from lorasweep.config.overrides import group_options, override_text, parse
from lorasweep.config.paths import PATHS, path_text
from lorasweep.errors import ConfigError, did_you_mean

Value = None | bool | int | float | str
PARTS = 3
"""Parts of a range, of which a question compares trials."""
YAML_FIELDS = ("low", "high", "step", "log", "whole", "choices", "when")


@dataclass(frozen=True, kw_only=True)
class Dimension:
    """One key that varies: between named choices, or in a range of numbers with both ends in it."""

    key: str
    names: tuple[Value, ...] = ()
    """What the sampler, tables and conditions see of each choice; empty for a range."""
    texts: tuple[str, ...] = ()
    """What each choice sets: the text after `key=`."""
    low: float = 0
    high: float = 0
    step: float | None = None
    log: bool = False
    whole: bool = False
    """Only whole numbers."""
    when: str | None = None
    """The key is set only where this holds; elsewhere it keeps its configured value."""

    def values(self) -> list[Value]:
        """Return every value in order. Raises ConfigError where a range has no end of them."""
        if self.names:
            return list(self.names)
        if self.log or (self.step is None and not self.whole):
            raise ConfigError(
                [
                    f"{self.key}: interval() has no end as a grid; write the values, e.g. {self.key}=a,b,c, "
                    "or choose a sampler, e.g. search.sampler=tpe"
                ]
            )
        return list(steps(self.low, self.high, self.step or 1))

    def every(self, most: int) -> list[Value] | None:
        """Return every value in order; None where there are more than `most`, or no end of them."""
        if not self.names and self.low < self.high and self.step is None and not self.whole:
            return None
        if not self.names and (self.high - self.low) / (self.step or 1) >= most:
            return None
        return list(self.names or [self._number(v) for v in steps(self.low, self.high, self.step or 1)])

    def ends(self) -> list[Value]:
        """Return every choice, or both ends of a range."""
        return list(self.names) or list(dict.fromkeys([self._number(self.low), self._number(self.high)]))

    def part(self, value: Any) -> Value:
        """Return which part of it a value lies in: the choice itself, or a third of a range, from 0."""
        if self.names:
            return value
        low, high, at = (math.log(n) if self.log else n for n in (self.low, self.high, value))
        return min(PARTS - 1, int(PARTS * (at - low) / (high - low))) if high > low else 0

    def snap(self, value: Any) -> Value:
        """Return the value of a stepped or whole range that is nearest to a sampled one, free of rounding dirt."""
        if self.names:
            return value
        if self.step is None:
            return self._number(value)
        nearest = round((value - self.low) / self.step)
        return self._number(float(_exact(self.low) + nearest * _exact(self.step)))

    def holds(self, value: Any) -> bool:
        """Return whether a value lies in it."""
        if self.names:
            return any(same(name, value) for name in self.names)
        if isinstance(value, bool) or not isinstance(value, int | float) or not self.low <= value <= self.high:
            return False
        return (not self.whole or value == int(value)) and (self.step is None or close(value, self.snap(value)))

    def seen(self, setting: Any) -> Value:
        """Return what the sampler, tables and conditions see of a setting: the name of its choice, or its value."""
        for name, text in zip(self.names, self.texts, strict=True):
            if same(parsed_value(f"{self.key}={text}"), setting):
                return name
        return self.snap(setting) if not self.names and self.holds(setting) else plain(setting)

    def text(self, value: Value) -> str:
        """Return what a value sets, as the text after `key=`."""
        for name, text in zip(self.names, self.texts, strict=True):
            if same(name, value):
                return text
        return override_text(value)

    def as_yaml(self) -> dict[str, Any]:
        """Return what a sweep file says of it: the mapping under its key."""
        out: dict[str, Any] = {"when": self.when} if self.when else {}
        if self.names:
            values = [parsed_value(f"{self.key}={text}") for text in self.texts]
            unnamed = all(same(n, plain(v)) for n, v in zip(self.names, values, strict=True))
            return {"choices": values if unnamed else dict(zip(self.names, values, strict=True))} | out
        ends: dict[str, Any] = {"low": self._number(self.low), "high": self._number(self.high)}
        step = {"step": self._number(self.step)} if self.step else {}
        whole = {"whole": True} if self.whole and _number_kind(self.key) is not int else {}
        return ends | step | ({"log": True} if self.log else {}) | whole | out

    def _number(self, value: float) -> int | float:
        return int(value) if self.whole else float(value)

    def __str__(self) -> str:
        """Show it on one line."""
        if self.names:
            pairs = zip(map(override_text, self.names), self.texts, strict=True)
            shown = ",".join(
                name if name.strip("'\"") == text.strip("'\"") else f"{name}={text}" for name, text in pairs
            )
        else:
            shown = f"{self._number(self.low)} to {self._number(self.high)}"
            shown += f" step {self._number(self.step)}" if self.step else ""
            shown += " log" if self.log else ""
        return shown + (f" when {self.when}" if self.when else "")


def steps(low: float, high: float, step: float) -> Iterator[int | float]:
    """Yield low, low + step, ... up to high, decimal as they are written: 0.3, not 0.30000000000000004."""
    whole = isinstance(low, int) and isinstance(step, int)
    for i in range(int((_exact(high) - _exact(low)) / _exact(step)) + 1):
        value = _exact(low) + i * _exact(step)
        yield int(value) if whole else float(value)


def _exact(number: float) -> Decimal:
    return Decimal(str(number))


def same(a: Any, b: Any) -> bool:
    """Return whether two values are equal and not a number and a truth value."""
    return isinstance(a, bool) == isinstance(b, bool) and a == b


def close(a: Any, b: Any) -> bool:
    return abs(a - b) <= 1e-9 * max(1.0, abs(a))


def parsed_value(override: str) -> Any:
    """Return what an override string sets. Raises ConfigError where it is not one."""
    parsed, problems = parse([override])
    if problems:
        raise ConfigError(problems)
    return parsed[0].value()


def plain(value: Any) -> Value:
    """Return a value as tables and samplers take it: lists and mappings as their text."""
    return value if value is None or isinstance(value, bool | int | float | str) else override_text(value)


# --- reading one -----------------------------------------------------------------------------------------------------


def of_override(override: Override) -> tuple[Dimension | None, list[str]]:
    """Return the dimension of an override in Hydra's sweep syntax, and what is wrong with it."""
    key, sweep = override.key_or_group, override.value()
    if isinstance(sweep, Glob):
        return _choices(key, [(name, name) for name in sweep.filter(group_options(key))])
    assert isinstance(sweep, Sweep)
    strange = sorted(sweep.tags - {"log"})
    if strange:
        return None, [f"{key}: tag '{strange[0]}' means nothing; known: log, as in {key}=tag(log, interval(1, 100))"]
    if isinstance(sweep, IntervalSweep):
        whole = isinstance(sweep.start, int) and isinstance(sweep.end, int)
        return _range(key, sweep.start, sweep.end, log="log" in sweep.tags, whole=whole)
    if sweep.tags:
        return None, [f"{key}: tag(log, ...) goes with interval(); write the values on their own"]
    if isinstance(sweep, RangeSweep):
        return _of_range(key, sweep)
    assert isinstance(sweep, ChoiceSweep)
    values = [_unquoted(v) for v in override.sweep_iterator()]
    return _choices(key, [(plain(v), v) for v in values])


def _unquoted(value: Any) -> Any:
    if isinstance(value, list):
        return [_unquoted(v) for v in value]
    if isinstance(value, dict):
        return {_unquoted(k): _unquoted(v) for k, v in value.items()}
    return value.text if isinstance(value, QuotedString) else value


def _of_range(key: str, sweep: RangeSweep) -> tuple[Dimension | None, list[str]]:
    """range(): a stepped range; where its order is asked for, downwards or shuffled, choices in that order."""
    start, stop, step = sweep.start, sweep.stop, sweep.step
    assert start is not None and stop is not None
    count = math.ceil((_exact(stop) - _exact(start)) / _exact(step)) if step else 0
    if count < 1:
        return None, [f"{key}: range({start}, {stop}, {step}) holds no value; its end is not part of it"]
    last = _exact(start) + (count - 1) * _exact(step)
    whole = isinstance(start, int) and isinstance(step, int)
    if step > 0 and not sweep.shuffle:
        return _range(key, start, int(last) if whole else float(last), step=step, whole=whole)
    values = list(steps(start, float(last), step))
    if sweep.shuffle:
        shuffle(values)
    return _choices(key, [(v, v) for v in values])


def of_yaml(key: str, entry: Any) -> tuple[Dimension | None, list[str]]:
    """Return the dimension of a sweep file's entry, a string in Hydra's syntax or a mapping, and its problems."""
    if isinstance(entry, str):
        parsed, problems = parse([f"{key}={entry}"])
        if parsed and not parsed[0].is_sweep_override():
            return None, [f"{key}: does not vary; put {key}={entry} under overrides"]
        return of_override(parsed[0]) if parsed else (None, problems)
    if key not in spec.SECTIONS and key not in spec.known_keys():
        return None, [f"{key}: no such key{did_you_mean(key, [*spec.known_keys(), *spec.SECTIONS])}"]
    if not isinstance(entry, Mapping):
        return None, [
            f"{key}: must be a string such as '4,8,16', or a mapping of {', '.join(YAML_FIELDS)}, got {entry!r}"
        ]
    problems = [f"{key}.{f}: no such field{did_you_mean(str(f), YAML_FIELDS)}" for f in entry if f not in YAML_FIELDS]
    when = entry.get("when")
    if when is not None and not isinstance(when, str):
        problems.append(f'{key}: when must be a condition such as "lora.r > 4", got {when!r}')
    made, more = _of_mapping(key, entry)
    if made is None or problems or more:
        return None, problems + more
    return replace(made, when=when), []


def _of_mapping(key: str, entry: Mapping[str, Any]) -> tuple[Dimension | None, list[str]]:
    if "choices" in entry:
        others = [f for f in entry if f not in ("choices", "when")]
        choices = entry["choices"]
        if others:
            return None, [f"{key}: choices and {others[0]} exclude each other; keep one of them"]
        if isinstance(choices, Mapping):
            return _choices(key, list(choices.items()))
        if isinstance(choices, list):
            return _choices(key, [(plain(v), v) for v in choices])
        return None, [f"{key}: choices must be a list, or a mapping of names to values, got {choices!r}"]
    missing = [f for f in ("low", "high") if f not in entry]
    if missing:
        return None, [f"{key}: {missing[0]} is missing; give low and high, or choices"]
    flags = {f: entry.get(f, False) for f in ("log", "whole")}
    wrong = [f"{key}: {f} must be true or false, got {v!r}" for f, v in flags.items() if not isinstance(v, bool)]
    return (None, wrong) if wrong else _range(key, entry["low"], entry["high"], step=entry.get("step"), **flags)


def _choices(key: str, named: Sequence[tuple[Any, Any]]) -> tuple[Dimension | None, list[str]]:
    if not named:
        return None, [f"{key}: choices are empty; give at least one value"]
    problems: list[str] = []
    names: list[Value] = []
    texts: list[str] = []
    for name, value in named:
        if any(same(name, n) for n in names):
            continue
        names.append(plain(name))
        texts.append(path_text(key, value) if key in PATHS else override_text(value))
        problems += value_problems(key, value)
    return (None if problems else Dimension(key=key, names=tuple(names), texts=tuple(texts))), problems


def _range(
    key: str, low: Any, high: Any, *, step: Any = None, log: bool = False, whole: bool = False
) -> tuple[Dimension | None, list[str]]:
    kind = _number_kind(key)
    given = {"low": low, "high": high} | ({} if step is None else {"step": step})
    wrong = [f"{key}: {f} must be a number, got {v!r}" for f, v in given.items() if not _is_number(v)]
    if kind is None or wrong:
        return None, wrong or [f"{key}: takes no number; write the values, {key}=a,b,c"]
    whole = whole or kind is int
    if whole:
        wrong = [f"{key}: {f} must be a whole number, got {v:g}" for f, v in given.items() if v != int(v)]
    if low > high:
        wrong.append(f"{key}: low must not be above high, got {low:g} and {high:g}")
    if log and low <= 0:
        wrong.append(f"{key}: log needs low above 0, got {low:g}")
    if log and step is not None:
        wrong.append(f"{key}: log and step exclude each other; drop one of them")
    if step is not None and step <= 0:
        wrong.append(f"{key}: step must be above 0, got {step:g}")
    number = int if whole else float
    if not wrong:
        wrong = value_problems(key, number(low)) + value_problems(key, number(high))
    if wrong:
        return None, list(dict.fromkeys(wrong))
    if step is not None:
        *_, high = steps(low, high, step)
        step = number(step)
    return Dimension(key=key, low=number(low), high=number(high), step=step, log=log, whole=whole), []


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def value_problems(key: str, value: Any) -> list[str]:
    """Return what is wrong with one value, whatever the other keys have."""
    text = f"{key}={override_text(value)}"
    parsed, unreadable = parse([text])
    if unreadable or key in spec.SECTIONS or "${" in text:
        return unreadable
    if parsed[0].value() != value:
        return [f"{key}: {value!r} cannot be written as an override; choose another value"]
    problems: list[str] = []
    section, _, name = key.partition(".")
    field_rules.section(_alone(key), {name: value}, section, spec.known_keys(), problems)
    return problems


@cache
def _alone(key: str) -> type:
    """Return a section that has this key alone, so that no rule about several keys speaks."""
    section, _, name = key.partition(".")
    found = next(f for f in fields(spec.SECTIONS[section]) if f.name == name)
    return make_dataclass(section, [(name, _hint(key), field(default=None, metadata=found.metadata))])


def _hint(key: str) -> Any:
    section, _, name = key.partition(".")
    return get_type_hints(spec.SECTIONS[section])[name]


def _number_kind(key: str) -> type | None:
    """Return int or float as the key's type has it; None where it takes no number."""
    if key in spec.SECTIONS:
        return None
    hint = _hint(key)
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return float if float in options else int if int in options else None
