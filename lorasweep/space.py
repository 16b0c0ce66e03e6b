"""Hydra's sweep syntax to a search space: which keys vary, and the points of a grid."""

import itertools
from collections.abc import Sequence

from hydra.core.override_parser.types import Override

from lorasweep import compose
from lorasweep.errors import ConfigError


def grid(overrides: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Return the swept keys and one list of override strings a point, the last key varying fastest.

    Raises ConfigError for unreadable overrides, unknown keys and ranges without an end.
    """
    parsed, problems = compose.parse(overrides)
    swept: list[str] = []
    choices: list[list[str]] = []
    for override in parsed:
        key = override.get_key_element()
        if not override.is_sweep_override():
            choices.append([f"{key}={override.get_value_element_as_str()}"])
        elif override.is_discrete_sweep():
            swept.append(key)
            choices.append([f"{key}={value}" for value in _values(override)])
        else:
            problems.append(f"{key}: interval() has no end as a grid; write the values, e.g. {key}=a,b,c")
    if problems:
        raise ConfigError(problems)
    return swept, [list(point) for point in itertools.product(*choices)]


def _values(override: Override) -> list[str]:
    return list(dict.fromkeys(override.sweep_string_iterator()))
