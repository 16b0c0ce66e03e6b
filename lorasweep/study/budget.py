"""The budgets of a study: what ends it before its queue is empty."""

import time
from collections.abc import Callable, Sequence

from optuna.trial import FrozenTrial

from lorasweep.config.spec import SearchSpec
from lorasweep.study.direction import better


def device_s(trials: Sequence[FrozenTrial]) -> float:
    """Return the seconds that ended trials held a device."""
    return sum(t.user_attrs.get("device_s", 0.0) for t in trials)


def spent(
    search: SearchSpec,
    trials: Callable[[], Sequence[FrozenTrial]],
    best: Callable[[], FrozenTrial | None],
    maximize: bool,
    began: float | None,
    cost: Callable[[], float],
) -> str:
    """Return which budget is used up, in words, or nothing. `began` is when the study did, in s since the epoch.

    The trials are read only where a budget asks for them.
    """
    if search.wall_hours and began is not None and time.time() - began > 3600 * search.wall_hours:
        return f"search.wall_hours={search.wall_hours:g} are over"
    if search.device_hours and device_s(trials()) > 3600 * search.device_hours:
        return f"search.device_hours={search.device_hours:g} are used"
    if search.max_cost is not None and cost() >= search.max_cost:
        return f"search.max_cost={search.max_cost:g} is spent"
    if search.target is not None:
        leader = best()
        if leader is not None and not better(search.target, leader.values[0], maximize):
            return f"search.target={search.target:g} is reached by trial {leader.number}"
    return ""
