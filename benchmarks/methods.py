"""What benchmarks/replay.py scores: lorasweep's own study, and the anchors as people use them.

Ours is lorasweep.study.study.Study with its queue in memory: the same code draws, tells, spares and prunes as in a real
study. Optuna's anchors are asked and told as its documentation has it, with the defaults of its samplers and pruners.
Ray's and RapidFire's rules are written out here, from their documentation, since those packages bring clusters.
"""

import itertools
import random
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import optuna
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.storages import InMemoryStorage
from optuna.trial import FrozenTrial, TrialState
from simulated import Curves, Point, Result, pass_time

from lorasweep.config.overrides import key_of
from lorasweep.config.spec import SearchSpec, TrainSpec
from lorasweep.runner.points import split_point
from lorasweep.search import pruners, samplers, study_view
from lorasweep.search.dimension import parsed_value
from lorasweep.search.space import Space
from lorasweep.study import storage
from lorasweep.study.meta import Entry, StudyMeta
from lorasweep.study.study import Study

WARMUP_RATIO = TrainSpec().warmup_ratio


def settings_of(overrides: Sequence[str]) -> dict[str, Any]:
    """Return what override strings set, by key."""
    return {key_of(o): parsed_value(o) for o in overrides}


# --- ours ------------------------------------------------------------------------------------------------------------


def _in_memory(folder: Path, url: str | None) -> storage.Store:
    store = InMemoryStorage()

    def ids(study_id: int, state: TrialState) -> list[int]:
        return [t._trial_id for t in store.get_all_trials(study_id, deepcopy=False, states=(state,))]

    return storage.Store(store, nullcontext, ids)


class StudyInMemory(Study):
    """lorasweep's study without its folder; a trial's spec is its override strings."""

    def __init__(self, meta: StudyMeta) -> None:
        with mock.patch.object(storage, "open_store", _in_memory):
            super().__init__(Path("replayed"), meta, create=True)

    def spec(self, overrides: Sequence[str]) -> Any:
        return tuple(overrides)


class Ours:
    """A study of lorasweep's."""

    def __init__(self, space: Space, search: SearchSpec, total: int) -> None:
        recipes = [split_point(space, text.split()) for text in search.enqueue or []][: search.trials]
        meta = StudyMeta(
            name="replayed",
            swept=space.keys,
            overrides=[],
            metric="score",
            maximize=True,
            created="",
            space=space.describe(),
            search=asdict(search),
        )
        self.study = StudyInMemory(meta)
        entries = [Entry(given=given, extra=extra) for given, extra in recipes]
        self.study.queue.enqueue(entries + [Entry()] * ((search.trials or 0) - len(entries)))
        self.total = total
        self.eval_steps = pruners.rungs(search, total, WARMUP_RATIO)

    def ask(self, running: int) -> tuple[int, Mapping[str, Any]] | None:
        number = self.study.claim()
        if number is None:
            return None
        trial = self.study.drawn(number, lambda line, _: " ".join(line))
        return number, settings_of(trial.spec)  # type: ignore[arg-type]

    def report(self, number: int, step: int, value: float) -> None:
        self.study.queue.report(number, step, value)

    def should_prune(self, number: int) -> bool:
        return self.study.should_prune(number, self.total, WARMUP_RATIO)

    def tell(self, number: int, complete: bool, value: float) -> None:
        self.study.queue.tell(number, "COMPLETE" if complete else "PRUNED", [value], {})

    def best(self) -> int | None:
        best = self.study.best()
        return None if best is None else best.number


# --- Optuna's --------------------------------------------------------------------------------------------------------


class Optuna:
    """A sampler and a pruner of Optuna's, asked for `trials` trials."""

    eval_steps: frozenset[int] = frozenset()

    def __init__(
        self, space: Space, trials: int, sampler: BaseSampler, pruner: BasePruner, recipes: Sequence[str] = ()
    ) -> None:
        self.space = space
        self.left = trials
        with study_view.quiet_optuna():
            self.study = optuna.create_study(direction="maximize", sampler=sampler, pruner=pruner)
        for text in recipes[:trials]:
            self.study.enqueue_trial(split_point(space, text.split())[0])
        self.open: dict[int, optuna.Trial] = {}

    def ask(self, running: int) -> tuple[int, Mapping[str, Any]] | None:
        if not self.left:
            return None
        self.left -= 1
        with study_view.quiet_optuna():
            trial = self.study.ask()
            point: dict[str, Any] = {}
            for d in self.space.dimensions:
                if self.space.applies(d, point):
                    point[d.key] = d.snap(samplers._suggest(trial, d))
        self.open[trial.number] = trial
        return trial.number, settings_of(self.space.line(point))

    def report(self, number: int, step: int, value: float) -> None:
        self.open[number].report(value, step)

    def should_prune(self, number: int) -> bool:
        with study_view.quiet_optuna():
            return self.open[number].should_prune()

    def tell(self, number: int, complete: bool, value: float) -> None:
        state = TrialState.COMPLETE if complete else TrialState.PRUNED
        self.study.tell(self.open.pop(number), value if complete else None, state=state)

    def best(self) -> int | None:
        return _best(self.study.get_trials(deepcopy=False))


def _best(trials: Sequence[FrozenTrial]) -> int | None:
    done = [t for t in trials if t.state == TrialState.COMPLETE]
    done = done or [t for t in trials if t.state == TrialState.PRUNED and t.intermediate_values]
    if not done:
        return None
    return max(
        done, key=lambda t: (t.value if t.value is not None else t.intermediate_values[t.last_step], -t.number)
    ).number


class RayAsha(BasePruner):
    """ray.tune's AsyncHyperBandScheduler: at each rung the best 1/reduction_factor of those recorded there go on; the
    first to come always does. grace_period 1, reduction_factor 4, in tenths of a run.
    """

    def __init__(self, total: int, looks: int, reduction_factor: int = 4) -> None:
        self._rungs = [total * reduction_factor**k / looks for k in range(10) if reduction_factor**k < looks]
        self._factor = reduction_factor
        self._recorded: dict[float, dict[int, float]] = {rung: {} for rung in self._rungs}

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        step = trial.last_step
        for rung in reversed(self._rungs):
            if step is None or step < rung or trial.number in self._recorded[rung]:
                continue
            recorded, value = self._recorded[rung], trial.intermediate_values[step]
            before = list(recorded.values())
            recorded[trial.number] = value
            return bool(before) and value < float(np.nanpercentile(before, (1 - 1 / self._factor) * 100))
        return False


class BohbSampler(optuna.samplers.TPESampler):
    """BOHB's rule (arXiv:1807.01774): the model is of the largest budget at which more trials were seen than there are
    dimensions; a third of the points is random.
    """

    def __init__(self, seed: int, dimensions: int) -> None:
        super().__init__(seed=seed, multivariate=True, group=True, n_startup_trials=dimensions + 1)
        self._random, self._fewest = random.Random(seed), dimensions + 1

    def sample_relative(self, study: Any, trial: FrozenTrial, search_space: dict[str, Any]) -> dict[str, Any]:
        if self._random.random() < 1 / 3:
            return {}
        return super().sample_relative(_AtBudget.of(study, self._fewest), trial, search_space)


class _AtBudget(study_view.FirstObjective):
    """A study whose trials have the values that they showed at the largest common budget."""

    _fewest: int

    @classmethod
    def of(cls, study: optuna.Study, fewest: int = 1) -> Any:
        view = cls(study)
        view._fewest = fewest
        return view

    def _get_trials(self, deepcopy: bool, states: Any, use_cache: bool) -> list[FrozenTrial]:
        trials = super()._get_trials(deepcopy, (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING), use_cache)
        steps = sorted({s for t in trials for s in t.intermediate_values}, reverse=True)
        for step in steps:
            seen = [t for t in trials if step in t.intermediate_values]
            if len(seen) >= self._fewest:
                return [_complete(t, t.intermediate_values[step]) for t in seen]
        return []


def _complete(trial: FrozenTrial, value: float) -> FrozenTrial:
    return optuna.create_trial(
        state=TrialState.COMPLETE, value=value, params=trial.params, distributions=trial.distributions
    )


# --- the other anchors -----------------------------------------------------------------------------------------------


@dataclass
class _Seen:
    setting: Mapping[str, Any]
    values: dict[int, float]
    complete: bool = False
    gone: bool = False


class Listed:
    """Settings that stand before the study, run to their end: a shuffled grid as Axolotl's, a grid of three rates."""

    eval_steps: frozenset[int] = frozenset()

    def __init__(self, settings: Sequence[Mapping[str, Any]]) -> None:
        self.trials = [_Seen(s, {}) for s in settings]
        self._next = itertools.count()

    def ask(self, running: int) -> tuple[int, Mapping[str, Any]] | None:
        number = next(self._next)
        return (number, self.trials[number].setting) if number < len(self.trials) else None

    def report(self, number: int, step: int, value: float) -> None:
        self.trials[number].values[step] = value

    def should_prune(self, number: int) -> bool:
        return False

    def tell(self, number: int, complete: bool, value: float) -> None:
        self.trials[number].complete, self.trials[number].gone = complete, True

    def best(self) -> int | None:
        done = [n for n, t in enumerate(self.trials) if t.complete]
        done = done or [n for n, t in enumerate(self.trials) if t.gone]
        return max(done, key=lambda n: list(self.trials[n].values.values())[-1]) if done else None


def chunked(
    curves: Curves, settings: Sequence[Mapping[str, Any]], slots: int, workers: int, seed: int, chunks: int = 4
) -> Result:
    """Return a study by RapidFire's rule: all settings go through the data side by side, chunk by chunk, however few
    the slots; after each chunk, those below the median stop.
    """
    alive = {n: curves.curve(s, (seed, n)) for n, s in enumerate(settings)}
    now, done, points = 0.0, 0, []
    for chunk in range(1, chunks + 1):
        step = round(curves.total * chunk / chunks)
        now += pass_time(len(alive), slots, workers, step - done)
        done = step
        shown = {n: c.at(step) for n, c in alive.items()}
        chosen = max(shown, key=lambda n: (shown[n], -n))
        points.append(Point(now, now * workers, alive[chosen].test, len(settings)))
        median = float(np.median(list(shown.values())))
        alive = {n: c for n, c in alive.items() if chunk == chunks or shown[n] >= median}
    states = ["COMPLETE" if n in alive else "PRUNED" for n in range(len(settings))]
    return Result(points, list(settings), states)
