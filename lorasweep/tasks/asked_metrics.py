"""Metrics that task_type.metrics asks for: ready ones by name, and functions of one's own as MODULE:FUNCTION.

A function takes rows, predictions and references, lists of one length, and returns a number a row, or one for all:

    def profit(rows, predictions, references):
        return [row["price"] * (p == r) for row, p, r in zip(rows, predictions, references)]

    profit.maximize = True

With a number a row, their mean is the metric, with intervals and comparisons; one for all has none.
"""

import importlib
import inspect
import math
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np

from lorasweep.errors import ConfigError, did_you_mean
from lorasweep.tasks.metric import Metric, Parts, Prediction, ratio

KEY = "task_type.metrics"
Called = Callable[[Sequence[Prediction]], tuple[list[int], float | list[float]]]
"""From predictions to rows and what the function says of them."""


def is_function(name: str) -> bool:
    """Return whether a name of task_type.metrics stands for a function of the user's."""
    return ":" in name


def asked(task: Any) -> list[Metric]:
    """Return the metrics that task_type.metrics asks of a task beside its own. Raises ConfigError where there is none
    of a name, and where a function cannot be had.
    """
    ready, own = {m.name: m for m in task.ready()}, {m.name for m in task.measures()}
    found: dict[str, Metric] = {}
    problems = []
    for name in dict.fromkeys(task.spec.metrics or []):
        if is_function(name):
            metric = _of_function(task, name)
            if metric.name in own | found.keys():
                problems.append(f"{KEY}: '{name}' is called as another metric, {metric.name}; give it another name")
            found[metric.name] = metric
            continue
        named = ready.get(name) or task.f_beta(name)
        if named is not None:
            found[name] = named
        elif name not in own:
            has = sorted({*own, *ready, *task.f_beta_names})
            problems.append(
                f"{KEY}: {task.name} has no '{name}'{did_you_mean(name, has)}; a function is MODULE:FUNCTION"
            )
    if problems:
        raise ConfigError(problems)
    return list(found.values())


@dataclass(frozen=True, eq=False)
class OwnMetric(Metric):
    """A function's values; without a value a row nothing tells how sure it is."""

    called: Called | None = None

    def parts(self, predictions: Sequence[Prediction]) -> Parts:
        assert self.called is not None, "it was made with one"
        rows, said = self.called(predictions)
        known = rows if isinstance(said, list) else []
        values = said if isinstance(said, list) else []
        return Parts(self.name, ratio.__name__, np.array(known, np.int64), values, [1.0] * len(values), self.bounds)

    def value(self, predictions: Sequence[Prediction]) -> float:
        assert self.called is not None, "it was made with one"
        _, said = self.called(predictions)
        if isinstance(said, list):
            return math.fsum(said) / len(said) if said else math.nan
        return said


def _of_function(task: Any, name: str) -> OwnMetric:
    """Return the metric of a function. Raises ConfigError where there is no such function."""
    module, _, function_name = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # where a script of the user's stands, as for `python -m`
    try:
        function = getattr(importlib.import_module(module), function_name, None)
    except Exception as error:  # whatever a user's module does when it is imported
        raise ConfigError([f"{KEY}: '{name}' cannot be imported:\n{_trace(error)}"]) from error
    if not callable(function):
        raise ConfigError([f"{KEY}: {module} has no function '{function_name}'"])
    try:
        inspect.signature(function).bind([], [], [])
    except TypeError as error:
        raise ConfigError([f"{KEY}: '{name}' must take rows, predictions and references ({error})"]) from error

    def called(predictions: Sequence[Prediction]) -> tuple[list[int], float | list[float]]:
        return _said(task, name, function, predictions)

    bounds = getattr(function, "bounds", (-math.inf, math.inf))
    unit, maximize = getattr(function, "unit", "as the function has it"), bool(getattr(function, "maximize", True))
    return OwnMetric(function_name, lambda p: {}, ratio, tuple(bounds), unit, maximize, called)


def _said(
    task: Any, name: str, function: Callable[..., Any], predictions: Sequence[Prediction]
) -> tuple[list[int], float | list[float]]:
    """Return rows and values, or one value. Raises ConfigError with the function's own traceback where it fails."""
    pairs: Mapping[int, tuple[Any, Any]] = task.pairs(predictions)
    if not pairs:
        raise ConfigError([f"{KEY}: '{name}' has nothing to look at; {task.no_pairs}"])
    rows = sorted(pairs)
    split = predictions[0].get("split", "eval")
    records = [dict(task.records[split][row]) for row in rows]
    try:
        found = function(records, [pairs[r][0] for r in rows], [pairs[r][1] for r in rows])
    except Exception as error:  # whatever a user's function does
        raise ConfigError([f"{KEY}: '{name}' fails on {len(rows)} rows of {split}:\n{_trace(error)}"]) from error
    if isinstance(found, Real):
        return rows, float(found)
    try:
        values = [float(v) for v in found]
    except (TypeError, ValueError):
        raise ConfigError(
            [f"{KEY}: '{name}' must return a number, or a number a row; it returned {found!r:.100}"]
        ) from None
    if len(values) != len(rows):
        raise ConfigError([f"{KEY}: '{name}' must return a number a row; it returned {len(values)} for {len(rows)}"])
    if not all(map(math.isfinite, values)):
        raise ConfigError([f"{KEY}: '{name}' must return finite numbers, one of {len(rows)} rows has none"])
    return rows, values


def _trace(error: BaseException) -> str:
    """Return the traceback from the user's own code on."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if f.filename != __file__ and "importlib" not in f.filename]
    return "".join([*traceback.format_list(own), *traceback.format_exception_only(error)]).rstrip()
