"""Hydra's sweep syntax to a search space: which keys vary, and the points of a grid."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lorasweep import compose

Value = None | bool | int | float | str


@dataclass(frozen=True)
class Grid:
    swept: list[str]
    """Keys with more than one value."""
    points: list[dict[str, Value]]
    """The swept keys' values; lists stand as their text."""
    lines: list[list[str]]
    """The overrides of each point, the sound ones."""
    problems: list[str]
    """What is wrong with the others."""


def grid(overrides: Sequence[str]) -> Grid:
    """Return the points of a grid, the last key varying fastest.

    Unreadable overrides, unknown keys and ranges without an end are left out and named in `problems`.
    """
    parsed, problems = compose.parse(overrides)
    choices: list[list[str]] = []
    swept: list[tuple[int, str]] = []
    for override in parsed:
        key = override.get_key_element()
        if not override.is_sweep_override():
            choices.append([str(override.input_line)])
        elif override.is_discrete_sweep():
            swept.append((len(choices), key))
            choices.append([f"{key}={value}" for value in dict.fromkeys(override.sweep_string_iterator())])
        else:
            problems.append(f"{key}: interval() has no end as a grid; write the values, e.g. {key}=a,b,c")
    lines = [list(line) for line in itertools.product(*choices)]
    points = [{key: value_of(line[i]) for i, key in swept} for line in lines]
    return Grid([key for _, key in swept], points, lines, problems)


def value_of(override: str) -> Value:
    """Return what an override string sets: a plain value, or the text of a list."""
    (parsed,), _ = compose.parse([override])
    value: Any = parsed.value()
    plain = value is None or isinstance(value, bool | int | float)
    return value if plain else parsed.get_value_element_as_str().strip("'\"")
