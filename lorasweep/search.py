"""Optuna's samplers and pruners: a space as its distributions, a point for a trial, and whether a trial ends early.

Each claim makes its own sampler, in whichever process claims; what samplers have to remember is in the study's storage.
"""

import copy
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.exceptions import ExperimentalWarning
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from lorasweep.dimension import Dimension, Value, close, same
from lorasweep.space import Lookup, Space
from lorasweep.spec import SearchSpec

STOPS_AT_RUNGS = ("asha", "hyperband")
RUNG = "completed_rung_{}"
"""Where Optuna's successive halving keeps what a trial showed at a rung, among the trial's system attributes."""

GENERATIONS = 4
"""nsga2 splits a study's trials into so many generations, each of 4 to 50 trials."""


# --- points ----------------------------------------------------------------------------------------------------------


def distributions(space: Space) -> dict[str, BaseDistribution]:
    """Return Optuna's distribution of each dimension; named choices stand by their names."""
    return {d.key: _distribution(d) for d in space.dimensions}


def _distribution(d: Dimension) -> BaseDistribution:
    if d.names:
        return CategoricalDistribution(d.names)
    if d.whole:
        return IntDistribution(int(d.low), int(d.high), log=d.log, step=int(d.step or 1))
    return FloatDistribution(d.low, d.high, log=d.log, step=d.step)


def holds(distribution: BaseDistribution, value: Any) -> bool:
    """Return whether a value lies in a distribution."""
    if isinstance(distribution, CategoricalDistribution):
        return any(same(choice, value) for choice in distribution.choices)
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if not distribution.low <= value <= distribution.high:
        return False
    if isinstance(distribution, IntDistribution) and value != int(value):
        return False
    step = distribution.step
    return step is None or close(value, distribution.low + round((value - distribution.low) / step) * step)


def suggest(trial: optuna.Trial, space: Space, lookup: Lookup | None = None) -> dict[str, Value]:
    """Return a trial's point, drawn by its study's sampler; keys whose condition does not hold are left out.

    `lookup` gives what a key is configured to that does not vary; None takes what the space knows.
    """
    # As Study.ask does, samplers are to see what others finished; but not what runs again with another seed.
    trial.study._thread_local.cached_all_trials = _searched(trial.study.get_trials(deepcopy=False))
    sampler = trial.study.sampler
    if isinstance(sampler, _Sobol):
        sampler.space = distributions(space)
    point: dict[str, Value] = {}
    with _quiet():
        for d in space.dimensions:
            if space.applies(d, point, lookup):
                point[d.key] = d.snap(_suggest(trial, d))
    return point


def _suggest(trial: optuna.Trial, d: Dimension) -> Any:
    if d.names:
        return trial.suggest_categorical(d.key, d.names)
    if d.whole:
        return trial.suggest_int(d.key, int(d.low), int(d.high), log=d.log, step=int(d.step or 1))
    return trial.suggest_float(d.key, d.low, d.high, log=d.log, step=d.step)


# --- samplers --------------------------------------------------------------------------------------------------------


def make_sampler(search: SearchSpec, number: int) -> BaseSampler:
    """Return the sampler for one trial: seed and number together seed it, so that no two trials draw alike.

    A grid has its points before it starts; what is drawn beside it is random.
    """
    seed = int(np.random.SeedSequence([search.seed, number]).generate_state(1)[0])
    with _quiet():
        match search.sampler:
            case "tpe":
                return _Tpe(
                    n_startup_trials=search.startup_trials,
                    seed=seed,
                    multivariate=True,
                    group=True,
                    constant_liar=True,
                )
            case "gp":
                return optuna.samplers.GPSampler(
                    seed=seed, n_startup_trials=search.startup_trials, warn_independent_sampling=False
                )
            case "cmaes":
                return optuna.samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False)
            case "qmc":
                return _Sobol(search.seed, number)
            case "nsga2":
                size = min(50, max(4, (search.trials or 20) // GENERATIONS))
                return optuna.samplers.NSGAIISampler(population_size=size, seed=seed)
    return optuna.samplers.RandomSampler(seed=seed)


def problems(search: SearchSpec, space: Space) -> list[str]:
    """Return why a sampler cannot search a space."""
    numbers = [d.key for d in space.dimensions if not d.names and d.low < d.high and d.when is None]
    if search.sampler == "cmaes" and search.objectives:
        return ["search.sampler: cmaes has one objective; take tpe, gp or nsga2, or leave out search.objectives"]
    if search.sampler == "cmaes" and not numbers:
        return ["search.sampler: cmaes moves ranges of numbers without a condition, got none; take tpe, or give one"]
    return []


class _Tpe(optuna.samplers.TPESampler):
    """TPE that goes by objective 0 when it orders pruned trials, which Optuna's refuses with several objectives."""

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return super().sample_relative(_FirstObjective.of(study), trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return super().sample_independent(_FirstObjective.of(study), trial, param_name, param_distribution)


class _Sobol(optuna.samplers.QMCSampler):
    """Sobol's sequence over all dimensions, conditional ones too. A trial's number is its place in the sequence."""

    space: Mapping[str, BaseDistribution]

    def __init__(self, seed: int, number: int) -> None:
        super().__init__(scramble=True, seed=seed, warn_independent_sampling=False)
        self._number = number

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {key: d for key, d in self.space.items() if not d.single()}

    def _find_sample_id(self, study: optuna.Study, search_space: dict[str, BaseDistribution]) -> int:
        return self._number


# --- pruners ---------------------------------------------------------------------------------------------------------


def make_pruner(search: SearchSpec, total_steps: int) -> BasePruner:
    """Return the pruner for a trial of so many optimiser steps."""
    least = _first_rung(search, total_steps)
    with _quiet():
        match search.pruner:
            case "asha":
                return optuna.pruners.SuccessiveHalvingPruner(
                    min_resource=least, reduction_factor=search.reduction_factor
                )
            case "hyperband":
                return _Hyperband(
                    min_resource=least, max_resource=total_steps, reduction_factor=search.reduction_factor
                )
            case "median":
                return optuna.pruners.MedianPruner(search.pruner_startup_trials, search.min_steps or 0)
            case "wilcoxon":
                return _Wilcoxon(search.pruner_startup_trials, search.min_steps or 0)
            case "threshold":
                return optuna.pruners.ThresholdPruner(search.lower, search.upper, search.min_steps or 0)
    return optuna.pruners.NopPruner()


def rungs(search: SearchSpec, total_steps: int) -> frozenset[int]:
    """Return the steps before the last at which asha and hyperband decide: the engine evaluates there too."""
    if search.pruner not in STOPS_AT_RUNGS:
        return frozenset()
    found, step = set(), _first_rung(search, total_steps)
    while step < total_steps:
        found.add(step)
        step *= search.reduction_factor
    return frozenset(found)


def should_prune(pruner: BasePruner, study: optuna.Study, trial: FrozenTrial, steps: Collection[int] = ()) -> bool:
    """Return whether a trial ends at the step it reported last, judged by the primary metric alone. `steps` are those
    of asha's rungs.
    """
    asha = isinstance(pruner, optuna.pruners.SuccessiveHalvingPruner)
    seen = _Rungs.beside(trial, study, sorted(steps)) if asha else _OwnTrials.of(study)
    with _quiet():
        return pruner.prune(seen, trial)


def _first_rung(search: SearchSpec, total_steps: int) -> int:
    return min(search.min_steps or max(1, total_steps // search.reduction_factor**2), max(1, total_steps))


class _Hyperband(optuna.pruners.HyperbandPruner):
    def _create_bracket_study(self, study: optuna.Study, bracket_id: int) -> optuna.Study:
        return _OwnTrials.of(super()._create_bracket_study(study, bracket_id))


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


# --- what samplers and pruners see of a study ------------------------------------------------------------------------


class _FirstObjective:
    """A study whose direction is that of objective 0, where Optuna raises for a study of several."""

    def __init__(self, study: optuna.Study) -> None:
        self._seen = study

    @classmethod
    def of(cls, study: optuna.Study) -> Any:
        """Return the view, as Optuna's signatures want a study."""
        return cls(study)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._seen, name)

    def _get_trials(self, deepcopy: bool, states: Sequence[TrialState] | None, use_cache: bool) -> list[FrozenTrial]:
        return _searched(self._seen._get_trials(deepcopy, states, use_cache))

    @property
    def direction(self) -> optuna.study.StudyDirection:
        return self._seen.directions[0]


class _OwnTrials(_FirstObjective):
    """What pruners compare with: this study's trials, without those that warm-started its sampler, and repeats."""

    def get_trials(self, deepcopy: bool = True, states: Sequence[TrialState] | None = None) -> list[FrozenTrial]:
        found = self._seen.get_trials(deepcopy=deepcopy, states=states)
        return [t for t in _searched(found) if "origin" not in t.user_attrs]

    @property
    def best_trial(self) -> FrozenTrial:
        done = [t for t in self.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)) if t.values]
        if not done:
            raise ValueError("no trial is complete")
        sign = -1 if self.direction == optuna.study.StudyDirection.MAXIMIZE else 1
        return min(done, key=lambda t: sign * t.values[0])


class _Rungs(_OwnTrials):
    """What asha compares with. Optuna lets a trial count at a rung once it was judged there; here it counts once it has
    reported there: of trials that came to a rung together, the first would else be judged against nobody. Trials of
    another length, whose rungs are at other steps, count as Optuna has it.
    """

    _judged: int
    _steps: Sequence[int]

    @classmethod
    def beside(cls, trial: FrozenTrial, study: optuna.Study, steps: Sequence[int]) -> Any:
        """Return the view in which this trial is judged."""
        view = cls(study)
        view._judged, view._steps = trial.number, steps
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


def _searched(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Return the trials that are no repeats of others with another seed."""
    return [t for t in trials if "repeat_of" not in t.user_attrs]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Optuna's remarks to ourselves: experimental parts, unlike steps of two trials, a missing greenlet."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        optuna.logging.set_verbosity(level)
