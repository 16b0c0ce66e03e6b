"""How a study will go on: how long it takes, and how likely more trials are to change the best.

How far trials come that the pruner may end is estimated as lifetimes are, those that still run counted as far as they
are (E. Kaplan, P. Meier, Nonparametric estimation from incomplete observations, 1958).
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from optuna.trial import FrozenTrial, TrialState

from lorasweep.search.order import ENDED
from lorasweep.study import repeats
from lorasweep.study.belief import near_enough
from lorasweep.study.direction import upward

if TYPE_CHECKING:
    from lorasweep.study.study import Study

SAMPLES = 4000
"""Of the mean and spread that trials may have."""
FEWEST_VALUES = 3
"""Finished trials before anything is said of those that wait."""


@dataclass(frozen=True)
class Survival:
    """Which share of the trials comes further than a share of its steps."""

    ends: Sequence[float]
    """Shares of their steps at which trials ended early, ascending, each once."""
    goes_on: Sequence[float]
    """For each of `ends`, which share of the trials that came there went on."""

    def mean_left(self, at: float) -> float:
        """Return which share of its steps a trial is expected to take yet that has come to `at`."""
        left, alive, place = 0.0, 1.0, at
        for end, share in zip(self.ends, self.goes_on, strict=True):
            if end >= at:
                left += alive * (end - place)
                alive, place = alive * share, end
        return left + alive * (1.0 - place)


def survival(ended: Sequence[float], running: Sequence[float]) -> Survival:
    """Return how far trials come; `ended` and `running` are the shares of their steps that they have taken."""
    ends = sorted({share for share in ended if share < 1})
    there = [*ended, *running]
    goes_on = [1 - sum(share == end for share in ended) / sum(share >= end for share in there) for end in ends]
    return Survival(ends, goes_on)


def seconds_left(
    ended: Sequence[float], running: Sequence[tuple[float, float]], waiting: int, elapsed_s: float
) -> float | None:
    """Return how long what is left takes at the pace so far; None before there is one.

    `ended` are the shares of their steps that trials took, `running` those of the others, each with the seconds that it
    has taken for it.
    """
    shares = [share for share, _ in running]
    done = sum(ended) + sum(shares)
    if done <= 0 or elapsed_s <= 0:
        return None
    lives = survival(ended, shares)
    left = waiting * lives.mean_left(0.0) + sum(map(lives.mean_left, shares))
    if waiting or len(running) != 1:
        return left * elapsed_s / done
    ((share, seconds),) = running  # the last one: at its pace
    return seconds / share * lives.mean_left(share) if share else left * elapsed_s / done


def chance_of_better(values: Sequence[float], pruned: int, more: int, margin: float) -> float | None:
    """Return how likely one of `more` trials beats the best of `values` by more than the margin, larger being better.

    Trials like those so far: normal ones, whose mean and spread the finished ones leave open, and pruned ones are not
    better. None where too few have finished, or all are equal.
    """
    from scipy.special import ndtr

    count = len(values)
    spread = statistics.stdev(values) if count >= FEWEST_VALUES else 0.0
    if spread == 0 or not more:
        return None
    rng = np.random.default_rng(0)
    sd_S = spread * np.sqrt((count - 1) / rng.chisquare(count - 1, SAMPLES))
    mean_S = statistics.fmean(values) + sd_S * rng.standard_normal(SAMPLES) / math.sqrt(count)
    one_S = ndtr((mean_S - max(values) - margin) / sd_S) * count / (count + pruned)
    return float(1 - ((1 - one_S) ** more).mean())


# --- of a study ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """How likely trials that have not ended yet change a study's best."""

    more: int
    """How many there are."""
    margin: float
    """By how much one has to be better."""
    chance: float


def change(study: "Study", trials: Sequence[FrozenTrial]) -> Change | None:
    """Return how likely what is left of the search beats its best by more than the margin; None where nothing tells."""
    maximize = study.meta.maximize
    own = [t for t in trials if repeats.is_searched(t)]
    values = [upward(t.values[0], maximize) for t in repeats.complete(own)]
    more = 0 if study.not_begun() else sum(t.state not in ENDED for t in own)
    if not values:
        return None
    margin = near_enough(study.search.margin, study.meta.bounds, max(values))
    chance = chance_of_better(values, sum(t.state == TrialState.PRUNED for t in own), more, margin)
    return None if chance is None else Change(more, margin, chance)


def time_left(study: "Study", now: float) -> float | None:
    """Return the seconds until a study's queue is empty, as of its workers' last sign; None where nothing tells."""
    signs = [sign for sign in study.signals.workers().values() if sign.get("began")]
    if not signs or study.not_begun():
        return None
    last = max(sign["at"] for sign in signs)
    progress: dict[int, Any] = {}
    for sign in signs:
        if sign["at"] > last - study.search.lease_s:
            progress |= {int(number): reached for number, reached in sign["trials"].items() if reached.get("of")}
    trials = study.trials()
    complete = [t for t in trials if t.state == TrialState.COMPLETE]
    most = max([t.user_attrs.get("steps", 1) for t in complete] + [at["of"] for at in progress.values()], default=1)
    ended: list[float] = []
    running: list[tuple[float, float]] = []
    waiting = 0
    for trial in trials:
        if trial.number in progress:
            reached = progress[trial.number]
            began = trial.datetime_start.timestamp() if trial.datetime_start else last
            running.append((reached["step"] / reached["of"], max(0.0, last - began)))
        elif trial.state in ENDED:
            taken = trial.user_attrs.get("steps", 0)
            ended.append(1.0 if trial.state == TrialState.COMPLETE else min(1.0, taken / most))
        else:
            waiting += 1
    if not running and not waiting:
        return None
    left = seconds_left(ended, running, waiting, _covered([(sign["began"], sign["at"]) for sign in signs]))
    return None if left is None else max(0.0, left - max(0.0, now - last))


def _covered(spans: Sequence[tuple[float, float]]) -> float:
    """Return the length of what spans of time cover together."""
    ordered = sorted(spans)
    merged = [ordered[0]]
    for begin, end in ordered[1:]:
        if begin <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((begin, end))
    return sum(end - begin for begin, end in merged)
