"""Pruners: at which steps a trial is judged, and whether it ends there."""

import copy
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import optuna
from optuna.pruners import BasePruner
from optuna.trial import FrozenTrial, TrialState

from lorasweep.config import registry
from lorasweep.config.spec import SearchSpec
from lorasweep.search import study_view
from lorasweep.search.order import REACHED
from lorasweep.search.study_view import FirstObjective

FIRST_LOOK, LAST_LOOK = 1 / 8, 9 / 10
"""Shares of a trial's steps before which, and after which, it is not compared with others."""
RUNG = f"{REACHED}{{}}"
"""Where Optuna's successive halving keeps what a trial showed at a rung, among the trial's system attributes."""


# --- pruners ---------------------------------------------------------------------------------------------------------


Make = Callable[[SearchSpec, int], BasePruner]
"""Takes the settings and the optimiser steps of a trial; returns its pruner."""

Problems = Callable[[SearchSpec], list[str]]
"""Says which settings a pruner lacks."""


@dataclass(frozen=True)
class Pruner:
    """What a value of search.pruner stands for."""

    make: Make
    at_rungs: bool
    """Whether it decides at rungs alone, where the engine then evaluates too."""
    problems: Problems
    compares: bool = True
    """Whether it judges a trial by others, which says something once they have learned something."""


def _no_problems(search: SearchSpec) -> list[str]:
    return []


def pruner(
    *, at_rungs: bool = False, problems: Problems = _no_problems, compares: bool = True
) -> Callable[[Make], Make]:
    """Register a function, which makes a pruner, under its name: the value of search.pruner."""

    def register(make: Make) -> Make:
        registry.PRUNERS.add(make.__name__, Pruner(make, at_rungs, problems, compares))
        return make

    return register


def window(search: SearchSpec, total_steps: int, warmup_ratio: float = 0.0) -> range:
    """Return the steps after which a trial of `total_steps` may end.

    A pruner that compares looks neither before an eighth of them nor before twice the warm-up, where a trial's rate has
    hardly begun to act, nor in the last tenth, which costs less than the end of a trial tells. search.min_steps moves
    the first look.
    """
    if not registry.PRUNERS.get(search.pruner).compares:
        return range(search.min_steps or 0, total_steps)
    first = max(math.ceil(total_steps * FIRST_LOOK), 2 * math.ceil(total_steps * warmup_ratio), 1)
    return range(search.min_steps or first, math.floor(total_steps * LAST_LOOK) + 1)


def make_pruner(search: SearchSpec, total_steps: int, warmup_ratio: float = 0.0) -> BasePruner:
    """Return the pruner for a trial of `total_steps` optimiser steps."""
    search = replace(search, min_steps=min(window(search, total_steps, warmup_ratio).start, max(1, total_steps)))
    with study_view.quiet_optuna():
        return registry.PRUNERS.get(search.pruner).make(search, total_steps)


@pruner()
def auto(search: SearchSpec, total_steps: int) -> BasePruner:
    """A study has another one in its place (choice.py)."""
    return none(search, total_steps)


@pruner()
def none(search: SearchSpec, total_steps: int) -> BasePruner:
    return optuna.pruners.NopPruner()


@pruner(at_rungs=True)
def asha(search: SearchSpec, total_steps: int) -> BasePruner:
    return optuna.pruners.SuccessiveHalvingPruner(
        min_resource=search.min_steps or 1, reduction_factor=search.reduction_factor
    )


@pruner(at_rungs=True)
def hyperband(search: SearchSpec, total_steps: int) -> BasePruner:
    return _Hyperband(
        min_resource=search.min_steps or 1,
        max_resource=total_steps,
        reduction_factor=search.reduction_factor,
    )


@pruner()
def median(search: SearchSpec, total_steps: int) -> BasePruner:
    return optuna.pruners.MedianPruner(search.pruner_startup_trials, search.min_steps or 0)


@pruner()
def wilcoxon(search: SearchSpec, total_steps: int) -> BasePruner:
    return _Wilcoxon(search.pruner_startup_trials, search.min_steps or 0)


def _threshold_problems(search: SearchSpec) -> list[str]:
    if search.lower is None and search.upper is None:
        return ["search.pruner: threshold needs search.lower or search.upper"]
    return []


@pruner(problems=_threshold_problems, compares=False)
def threshold(search: SearchSpec, total_steps: int) -> BasePruner:
    return optuna.pruners.ThresholdPruner(search.lower, search.upper, search.min_steps or 0)


def rungs(search: SearchSpec, total_steps: int, warmup_ratio: float = 0.0) -> frozenset[int]:
    """Return the steps before the last at which a pruner of rungs decides: the engine evaluates there too."""
    if not registry.PRUNERS.get(search.pruner).at_rungs:
        return frozenset()
    looks = window(search, total_steps, warmup_ratio)
    found, step = set(), looks.start
    while step in looks:
        found.add(step)
        step *= search.reduction_factor
    return frozenset(found)


def should_prune(
    pruner: BasePruner,
    study: optuna.Study,
    trial: FrozenTrial,
    steps: Collection[int] = (),
    seen: Sequence[FrozenTrial] | None = None,
) -> bool:
    """Return whether a trial ends at the step it reported last, judged by the primary metric alone. `steps` are those
    of the rungs of asha, or of hyperband's bracket 0. With `seen`, trials count as they are there and no others.
    """
    by_rungs = isinstance(pruner, optuna.pruners.SuccessiveHalvingPruner | optuna.pruners.HyperbandPruner)
    view: Any = _Rungs.beside(trial, study, sorted(steps)) if by_rungs else _OwnTrials.of(study)
    view.only = None if seen is None else {t.number: t for t in seen}
    with study_view.quiet_optuna():
        return pruner.prune(view, trial)


def is_spared(trial: FrozenTrial, trials: Sequence[FrozenTrial], fewest: int, maximize: bool) -> bool:
    """Return whether a trial runs on whatever the pruner says, so that at least `fewest` of the search's trials end
    complete.

    It does while it is one of the best `fewest` of those that have reported at its step, and where without it too few
    are left. At each step the best `fewest` that ever come there were spared, so that as many come to the next one.
    """
    others = [t for t in trials if t.number != trial.number]
    may_end = (TrialState.COMPLETE, TrialState.RUNNING, TrialState.WAITING)
    if sum(t.state in may_end for t in others) < fewest:
        return True
    step = trial.last_step
    if step is None:
        return False
    own, sign = trial.intermediate_values[step], 1 if maximize else -1
    rivals = (t.intermediate_values.get(step) for t in others if t.state != TrialState.FAIL)
    return sum(v is not None and sign * v > sign * own for v in rivals) < fewest


class _Hyperband(optuna.pruners.HyperbandPruner):
    def _create_bracket_study(self, study: Any, bracket_id: int) -> optuna.Study:
        """Return the bracket's own trials, in the view of the whole study. Bracket b begins at rung b."""
        return study.within(super()._create_bracket_study(study, bracket_id), bracket_id)


class _Wilcoxon(optuna.pruners.WilcoxonPruner):
    """Optuna's, with a number of finished trials and of steps before the first decision."""

    def __init__(self, startup_trials: int, min_steps: int) -> None:
        super().__init__()
        self._startup_trials, self._min_steps = startup_trials, min_steps

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if len(complete) < self._startup_trials or (trial.last_step or 0) < self._min_steps:
            return False
        return super().prune(study, trial)


class _OwnTrials(FirstObjective):
    """What pruners compare with: this study's trials, without those that warm-started its sampler, and repeats."""

    only: Mapping[int, FrozenTrial] | None = None
    """The trials that count, by number, in the state in which they do; None: all, as they are."""

    def get_trials(self, deepcopy: bool = True, states: Sequence[TrialState] | None = None) -> list[FrozenTrial]:
        found = self._seen.get_trials(deepcopy=deepcopy)
        if self.only is not None:
            found = [self.only[t.number] for t in found if t.number in self.only]
        counted = [t for t in study_view.searched(found) if "origin" not in t.user_attrs]
        return [t for t in counted if states is None or t.state in states]

    @property
    def best_trial(self) -> FrozenTrial:
        done = [t for t in self.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)) if t.values]
        if not done:
            raise ValueError("no trial is complete")
        best = max if self.direction == optuna.study.StudyDirection.MAXIMIZE else min
        return best(done, key=lambda t: t.values[0])


class _Rungs(_OwnTrials):
    """What asha and hyperband compare with. Optuna lets a trial count at a rung once it was judged there; here it
    counts once it has reported there: of trials that came to a rung together, the first would else be judged against
    nobody. Trials of another length, whose rungs are at other steps, count as Optuna has it.
    """

    _judged: int
    _steps: Sequence[int]

    @classmethod
    def beside(cls, trial: FrozenTrial, study: optuna.Study, steps: Sequence[int]) -> Any:
        """Return the view in which this trial is judged."""
        view = cls(study)
        view._judged, view._steps = trial.number, steps
        return view

    def within(self, bracket: optuna.Study, first: int) -> Any:
        """Return the same view of a bracket of the study, whose first rung is that of this place."""
        view = type(self)(bracket)
        view._judged, view._steps, view.only = self._judged, self._steps[first:], self.only
        return view

    def get_trials(self, deepcopy: bool = True, states: Sequence[TrialState] | None = None) -> list[FrozenTrial]:
        return [self._counted(t) for t in super().get_trials(deepcopy, states)]

    def _counted(self, trial: FrozenTrial) -> FrozenTrial:
        if trial.number == self._judged:
            return trial
        reported = ((k, trial.intermediate_values.get(step)) for k, step in enumerate(self._steps))
        reached = {RUNG.format(k): value for k, value in reported if value is not None}
        seen = copy.copy(trial)
        seen.system_attrs = reached | trial.system_attrs
        return seen
