"""When a search may end: further trials are expected to better the answer by less than the margin."""

from collections.abc import Mapping, Sequence
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from lorasweep.study import repeats
from lorasweep.study.belief import expected_gain, near_enough
from lorasweep.study.direction import upward

FEWEST = 8
"""Finished trials before a study may end because more would not change the answer."""


def settled(trials: Sequence[FrozenTrial], margin: float | None, bounds: tuple[float, float], maximize: bool) -> str:
    """Return why the trials that wait could not better the answer by more than the margin, or nothing.

    Finished trials speak for those that are like them: a value that none had may be the one that matters, so a trial
    that brings one is run.
    """
    finished = repeats.complete(trials)
    waiting = [t for t in trials if t.state == TrialState.WAITING and repeats.is_searched(t)]
    if len(finished) < FEWEST or not waiting or any(_is_new(_point(t), finished) for t in waiting):
        return ""
    values = [upward(t.values[0], maximize) for t in finished]
    gain, enough = expected_gain(values, len(waiting)), near_enough(margin, bounds, max(values))
    if gain >= enough:
        return ""
    return (
        f"search.stop=when_settled: {len(waiting)} more trials like the {len(finished)} finished ones are expected to "
        f"gain {gain:.2g}, less than the margin of {enough:.2g}"
    )


def _point(trial: FrozenTrial) -> Mapping[str, Any]:
    """Return the values that a trial has for keys that vary; {} for one that a sampler will draw."""
    return trial.user_attrs.get("swept") or trial.system_attrs.get("fixed_params") or {}


def _is_new(point: Mapping[str, Any], finished: Sequence[FrozenTrial]) -> bool:
    """Return whether a point has a value that no finished trial has; of numbers, one beyond theirs."""
    for key, value in point.items():
        there = [p[key] for t in finished if key in (p := _point(t))]
        if _is_number(value) and there and all(map(_is_number, there)):
            if not min(there) <= value <= max(there):
                return True
        elif value not in there:
            return True
    return False


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
