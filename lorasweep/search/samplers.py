"""Optuna's samplers and pruners: a space as its distributions, a point for a trial, and whether a trial ends early.

Each claim makes its own sampler, in whichever process claims; what samplers have to remember is in the study's storage.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial

from lorasweep.config import registry
from lorasweep.config.spec import SearchSpec
from lorasweep.search import order, study_view
from lorasweep.search.dimension import Dimension, Value, close, same
from lorasweep.search.expected_end import with_ends
from lorasweep.search.space import Space
from lorasweep.search.study_view import FirstObjective

GENERATIONS = 4
"""Generations that nsga2 splits a study's trials into, each of 4 to 50 trials."""

ATTEMPTS = 8
"""Draws for a point that is no trial yet, before all that are left are looked at."""
ATTEMPTS_BEFORE_RANDOM = 4
LEAST_RESULTS = 2
"""Results that a model of them needs at least; with fewer a point is drawn at random."""


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


class Draft(optuna.Trial):
    """A trial whose point is drawn and not stored: one that turns out to be known is drawn again."""

    def __init__(self, study: optuna.Study, trial_id: int) -> None:
        super().__init__(study, trial_id)
        self._cached_frozen_trial = copy.deepcopy(self._cached_frozen_trial)  # a storage may give its own
        self._kept, self.storage = self.storage, _Unwritten(self.storage)  # type: ignore[assignment]

    def keep(self, params: Mapping[str, Any], space: Space) -> None:
        """Store a point's parameters as the trial's."""
        for key, distribution in distributions(space).items():
            if key in params and key not in self._kept.get_trial(self._trial_id).params:
                value = distribution.to_internal_repr(params[key])
                self._kept.set_trial_param(self._trial_id, key, value, distribution)


class _Unwritten:
    """A storage that takes no parameters."""

    def __init__(self, behind: Any) -> None:
        self._behind = behind

    def __getattr__(self, name: str) -> Any:
        return getattr(self._behind, name)

    def set_trial_param(self, *_: Any) -> None:
        """Leave it unwritten."""


def suggest(trial: optuna.Trial, space: Space) -> dict[str, Value]:
    """Return a trial's point, drawn by its study's sampler; keys whose condition does not hold are left out."""
    # As Study.ask does, samplers are to see what others finished; but not what runs again with another seed.
    trial.study._thread_local.cached_all_trials = study_view.searched(trial.study.get_trials(deepcopy=False))
    sampler = trial.study.sampler
    if isinstance(sampler, _Sobol):
        sampler.space = distributions(space)
    point: dict[str, Value] = {}
    with study_view.quiet_optuna():
        for d in space.dimensions:
            if space.applies(d, point):
                point[d.key] = d.snap(_suggest(trial, d))
    return point


def _suggest(trial: optuna.Trial, d: Dimension) -> Any:
    if d.names:
        return trial.suggest_categorical(d.key, d.names)
    if d.whole:
        return trial.suggest_int(d.key, int(d.low), int(d.high), log=d.log, step=int(d.step or 1))
    return trial.suggest_float(d.key, d.low, d.high, log=d.log, step=d.step)


# --- samplers --------------------------------------------------------------------------------------------------------


Make = Callable[[SearchSpec, int, int], BaseSampler]
"""Takes the settings, a trial's number and its seed; returns the sampler of that trial."""

Problems = Callable[[SearchSpec, Space], list[str]]
"""Says why a sampler cannot search a space."""


@dataclass(frozen=True)
class Sampler:
    """What a value of search.sampler stands for."""

    make: Make
    learns: bool
    """Whether its points depend on what other trials have shown."""
    problems: Problems
    starts_up: bool = False
    """Whether its first search.startup_trials points are spread over the space, by Sobol's sequence."""


def _none(search: SearchSpec, space: Space) -> list[str]:
    return []


def sampler(*, learns: bool, problems: Problems = _none, starts_up: bool = False) -> Callable[[Make], Make]:
    """Register a function, which makes a sampler, under its name: the value of search.sampler."""

    def register(make: Make) -> Make:
        registry.SAMPLERS.add(make.__name__, Sampler(make, learns, problems, starts_up))
        return make

    return register


def make_sampler(search: SearchSpec, number: int, attempt: int = 0, *, models: bool | None = None) -> BaseSampler:
    """Return the sampler for one trial: seed and number together seed it, so that no two trials draw alike.

    Where what it draws at first is known already, `attempt` gives other draws; the later ones are random. `models` says
    whether the trial's place lets it model results; None leaves that to the number of results.
    """
    seeds = [search.seed, number, attempt] if attempt else [search.seed, number]
    seed = int(np.random.SeedSequence(seeds).generate_state(1)[0])
    name = search.sampler if attempt < ATTEMPTS_BEFORE_RANDOM else random.__name__
    wanted = registry.SAMPLERS.get(name)
    startup = order.startup(search)
    if models is not None and wanted.starts_up:
        startup = LEAST_RESULTS
        if not models:
            wanted = registry.SAMPLERS.get(random.__name__ if attempt else qmc.__name__)
    with study_view.quiet_optuna():
        return wanted.make(replace(search, startup_trials=startup), number, seed)


def learns(search: SearchSpec) -> bool:
    """Tell whether the points that a sampler draws depend on what other trials have shown by then."""
    return registry.SAMPLERS.get(search.sampler).learns


def problems(search: SearchSpec, space: Space) -> list[str]:
    """Return why a sampler cannot search a space."""
    return registry.SAMPLERS.get(search.sampler).problems(search, space)


@sampler(learns=False)
def auto(search: SearchSpec, number: int, seed: int) -> BaseSampler:
    """A study has another one in its place (choice.py); a trial by itself has nothing to draw."""
    return random(search, number, seed)


@sampler(learns=False)
def grid(search: SearchSpec, number: int, seed: int) -> BaseSampler:
    """A grid has its points before it starts; what is drawn beside it is random."""
    return random(search, number, seed)


@sampler(learns=False)
def random(search: SearchSpec, number: int, seed: int) -> BaseSampler:
    return optuna.samplers.RandomSampler(seed=seed)


@sampler(learns=True, starts_up=True)
def tpe(search: SearchSpec, number: int, seed: int) -> BaseSampler:
    return _Tpe(n_startup_trials=order.startup(search), seed=seed, multivariate=True, group=True, constant_liar=True)


@sampler(learns=True, starts_up=True)
def gp(search: SearchSpec, number: int, seed: int) -> BaseSampler:
    return _Gp(seed=seed, n_startup_trials=order.startup(search), warn_independent_sampling=False)


def _cmaes_problems(search: SearchSpec, space: Space) -> list[str]:
    numbers = [d.key for d in space.dimensions if not d.names and d.low < d.high and d.when is None]
    if search.objectives:
        return ["search.sampler: cmaes has one objective; take tpe, gp or nsga2, or leave out search.objectives"]
    if not numbers:
        return ["search.sampler: cmaes moves ranges of numbers without a condition, got none; take tpe, or give one"]
    return []


@sampler(learns=True, problems=_cmaes_problems)
def cmaes(search: SearchSpec, number: int, seed: int) -> BaseSampler:
    return optuna.samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False)


@sampler(learns=False)
def qmc(search: SearchSpec, number: int, seed: int) -> BaseSampler:
    return _Sobol(search.seed, number)


@sampler(learns=True)
def nsga2(search: SearchSpec, number: int, seed: int) -> BaseSampler:
    size = min(50, max(4, (search.trials or 20) // GENERATIONS))
    return optuna.samplers.NSGAIISampler(population_size=size, seed=seed)


class _Gp(optuna.samplers.GPSampler):
    """A Gaussian process that learns from pruned trials too; Optuna's sees those alone that ended complete."""

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        ended = with_ends(study._get_trials(deepcopy=False))
        return super().sample_relative(study_view.Seen.of(study, ended), trial, search_space)


class _Tpe(optuna.samplers.TPESampler):
    """TPE that goes by objective 0 when it orders pruned trials, which Optuna's refuses with several objectives."""

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return super().sample_relative(FirstObjective.of(study), trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return super().sample_independent(FirstObjective.of(study), trial, param_name, param_distribution)


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
