"""Whose results count for whom: those of the trials before it in line, whatever the clock says.

Trials of a search stand in line by number. A draw sees the results of the first of them, how many depends on its place
alone, and takes those between as under way; it waits until they have ended. So search.seed says which points are
drawn: on a fast machine and on a slow one, in one slot or in eight. Pruners of such a study judge a trial by the same
results, so that what a trial comes to depends on no clock either.

What a person adds stands in no line: it counts once it has ended.
"""

import copy
from collections.abc import Sequence

from optuna.trial import FrozenTrial, TrialState

from lorasweep.config.spec import SearchSpec
from lorasweep.search.study_view import searched

AUTO = "auto"
ADDED = "added"
"""User attribute of a trial that a person added."""
BESIDE = ("origin", "repeat_of", "baseline", "retry_of", ADDED)
"""User attributes of trials that stand in no line: another study's, repeats, baselines, failed ones again, added ones.
"""
REACHED = "completed_rung_"
"""How the system attributes begin in which Optuna keeps what a trial showed at a rung."""
ENDED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
MOST_STARTUP = 10
"""The most that search.startup_trials=auto comes to, and what it is in a study that was made without a choice."""
LEAST_IN_FLIGHT, OF_A_WORKER = 8, 4
"""search.in_flight=auto: at least the first, and the second for each worker."""


def startup(search: SearchSpec) -> int:
    """Return how many draws see nothing."""
    return search.startup_trials if isinstance(search.startup_trials, int) else MOST_STARTUP


def in_flight(search: SearchSpec) -> int:
    """Return how many trials may be under way at once where a sampler learns."""
    if isinstance(search.in_flight, int):
        return search.in_flight
    return max(LEAST_IN_FLIGHT, OF_A_WORKER * search.workers)


def sees(place: int, startup: int, most_in_flight: int) -> int:
    """Return how many results the draw at a place of the line sees: none up to `startup`, then at least half of those
    before it.
    """
    if place < startup:
        return 0
    under_way = min(most_in_flight - 1, max(1, place // 2 - 1), place - 1)
    return place - max(0, under_way)


class Line:
    """A study's trials in line, as a learning search counts them."""

    def __init__(self, trials: Sequence[FrozenTrial], search: SearchSpec, learns: bool) -> None:
        self.trials = [t for t in trials if not any(key in t.user_attrs for key in BESIDE)]
        self._beside = [t for t in trials if any(key in t.user_attrs for key in BESIDE)]
        self._places = {t.number: place for place, t in enumerate(self.trials)}
        self._learns = learns
        self._most = in_flight(search)
        teachers = sum("origin" in t.user_attrs and t.state in ENDED for t in self._beside)
        self.startup = max(0, startup(search) - teachers)
        """Places whose draws see nothing."""

    def __contains__(self, number: int) -> bool:
        return number in self._places

    def sees(self, number: int) -> int:
        """Return how many trials at the head of the line a trial sees the results of."""
        return sees(self._places[number], self.startup, self._most) if self._learns else 0

    def models(self, number: int) -> bool:
        """Return whether a trial's point is drawn by what results say, not by the plan of the first ones."""
        return self._learns and self._places[number] >= self.startup

    def next(self) -> FrozenTrial | None:
        """Return the trial whose point is drawn next; None where it has to wait for others, or there is none.

        Points are drawn in line: a sampler keeps away from those that are under way.
        """
        place = next((p for p, t in enumerate(self.trials) if not _is_settled(t)), None)
        if place is None:
            return None
        trial = self.trials[place]
        is_told = all(t.state in ENDED for t in self.trials[: self.sees(trial.number)])
        return trial if is_told and trial.state == TrialState.WAITING else None

    def seen_by(self, number: int) -> list[FrozenTrial]:
        """Return the trials before one in line and itself, as its draw and its pruner see them: what they may not know
        yet is under way.
        """
        count, place = self.sees(number), self._places[number]
        before = [self._not_told(t) for t in self.trials[count:place] if "overrides" in t.user_attrs]
        beside = searched(self._beside)
        return sorted([*self.trials[:count], *before, self.trials[place], *beside], key=lambda t: t.number)

    def after(self, number: int) -> list[FrozenTrial]:
        """Return the trials behind one in line, which count as under way."""
        return [_under_way(t) for t in self.trials[self._places[number] + 1 :]]

    def _not_told(self, trial: FrozenTrial) -> FrozenTrial:
        """Return a trial as under way; a failed one as that where nothing is told anyway, so that its point is free."""
        return trial if trial.state == TrialState.FAIL and not self._learns else _under_way(trial)


def _is_settled(trial: FrozenTrial) -> bool:
    """Return whether a trial's point is known, or it will have none."""
    return "overrides" in trial.user_attrs or trial.state in ENDED


def _under_way(trial: FrozenTrial) -> FrozenTrial:
    seen = copy.copy(trial)
    seen.state, seen.values, seen.intermediate_values = TrialState.RUNNING, None, {}
    seen.system_attrs = {k: v for k, v in trial.system_attrs.items() if not k.startswith(REACHED)}
    return seen
