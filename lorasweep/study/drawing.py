"""The point of a claimed trial: drawn by the sampler where it has none yet, and no other trial's.

A point is trained once. Where a sampler draws one that is a trial already, it draws again; where no other is left, or
where an added trial is another one over again, the trial is left out: it is no trial of the study any more.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from random import Random
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from lorasweep.config.overrides import overlaid
from lorasweep.config.spec import SearchSpec, TrialSpec
from lorasweep.errors import KnownPoint
from lorasweep.search import samplers, study_view
from lorasweep.search.dimension import same
from lorasweep.search.order import Line
from lorasweep.search.space import Space
from lorasweep.study.same_point import Identity
from lorasweep.study.storage import Store

LEFT_OUT = "left_out"
"""User attribute of a trial that was asked for and not trained: why."""
POINT = "point"
"""User attribute: the identity of a trial's point."""
RESULTS = "results_seen"
"""User attribute of a trial whose point a model drew: how many results it had."""
MOST_LISTED = 10_000
"""Points of a space that are looked at one by one, where the sampler draws none but known ones."""


KNOWN = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING, TrialState.WAITING)
"""A sampler does not come back to points of such trials; what failed may be tried again."""
JUDGED = (TrialState.COMPLETE, TrialState.PRUNED)
"""What samplers learn from."""
BY_HAND = (TrialState.COMPLETE, TrialState.RUNNING, TrialState.WAITING)
"""A person may also want again what was pruned."""


def is_own(trial: FrozenTrial) -> bool:
    """Return whether a trial is the study's: not taken from another one for the sampler, and not left out."""
    return "origin" not in trial.user_attrs and LEFT_OUT not in trial.user_attrs


def points(trials: Iterable[FrozenTrial], states: Sequence[TrialState]) -> dict[str, FrozenTrial]:
    """Return a study's trials in these states by the identity of their points, the first of each."""
    out: dict[str, FrozenTrial] = {}
    for trial in trials:
        known = trial.user_attrs
        if is_own(trial) and trial.state in states and POINT in known:
            out.setdefault(known[POINT], trial)
    return out


def _twin(
    trial: FrozenTrial, point: str, others: Iterable[FrozenTrial], states: Sequence[TrialState]
) -> FrozenTrial | None:
    """Return the first of the others that has a point."""
    return points([t for t in others if t.number != trial.number], states).get(point)


class Drawing:
    """Settles the points of a study's trials."""

    def __init__(
        self,
        study: optuna.Study,
        store: Store,
        search: SearchSpec,
        space: Space,
        spec: Callable[[Sequence[str]], TrialSpec],
        identity: Identity,
    ) -> None:
        self._study = study
        self._store = store
        self._search = search
        self._space = space
        self._spec = spec
        self._identity = identity

    def settled(self, trial: FrozenTrial, ensure_ours: Callable[[], None]) -> FrozenTrial:
        """Return the trial with its overrides and the identity of its point stored.

        Raises KnownPoint where it is left out.
        """
        known = trial.user_attrs
        if POINT not in known:
            why = known.get(LEFT_OUT) or (self._settle_given(trial) if "overrides" in known else self._draw(trial))
            if why:
                with self._store.exclusive():
                    ensure_ours()
                    self._store.optuna.set_trial_user_attr(trial._trial_id, LEFT_OUT, why)
                    self._store.optuna.set_trial_state_values(trial._trial_id, TrialState.FAIL)
                raise KnownPoint(why)
        return self._store.optuna.get_trial(trial._trial_id)

    def _line(self) -> Line:
        return Line(self._study.get_trials(deepcopy=False), self._search, samplers.learns(self._search))

    def _settle_given(self, trial: FrozenTrial) -> str:
        """Store the identity of a trial whose overrides are there; return why not, where another trial has it."""
        known = trial.user_attrs
        point = self._identity(self._spec(known["overrides"]), known.get("start_from"))
        with self._store.exclusive():
            twin = _twin(trial, point, self._study.get_trials(deepcopy=False), BY_HAND)
            if twin is None:
                self._store.optuna.set_trial_user_attr(trial._trial_id, POINT, point)
        return "" if twin is None else f"trial {trial.number} was not trained: it is trial {twin.number} over again"

    def _draw(self, trial: FrozenTrial) -> str:
        """Let the sampler choose a point that no other trial has, and store it; return why not, where none is left."""
        line = self._line()
        models, view = line.models(trial.number), study_view.Seen.of(self._study, line.seen_by(trial.number))
        for attempt in range(samplers.ATTEMPTS):
            self._study.sampler = samplers.make_sampler(self._search, trial.number, attempt, models=models)
            draft = samplers.Draft(view, trial._trial_id)
            point = samplers.suggest(draft, self._space)
            if self._take(trial, draft, draft.params, point):
                return ""
        for point in self._every(trial):
            if self._take(trial, draft, point, point):
                return ""
        return f"trial {trial.number} was not trained: every point that it could have is another trial's"

    def _every(self, trial: FrozenTrial) -> list[dict[str, Any]]:
        """Return the points of a small space that agree with what a trial has already, in a random order."""
        fixed = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
        every = [
            point
            for point in self._space.points(MOST_LISTED) or []
            if all(same(point[key], value) for key, value in fixed.items() if key in point)
        ]
        Random(f"{self._search.seed} {trial.number}").shuffle(every)
        return every

    def _take(
        self, trial: FrozenTrial, draft: samplers.Draft, params: Mapping[str, Any], point: Mapping[str, Any]
    ) -> bool:
        """Store a point as a trial's unless another trial has it; return whether it is stored."""
        line = overlaid(self._space.line(point), trial.user_attrs.get("extra", []))
        found = self._identity(self._spec(line), trial.user_attrs.get("start_from"))
        with self._store.exclusive():
            order = self._line()
            seen = order.seen_by(trial.number)
            if _twin(trial, found, seen, KNOWN) is not None:
                return False
            draft.keep(params, self._space)
            results = {RESULTS: sum(t.state in JUDGED for t in seen)} if order.models(trial.number) else {}
            for key, value in {**results, "swept": dict(point), "overrides": line, POINT: found}.items():
                self._store.optuna.set_trial_user_attr(trial._trial_id, key, value)
        return True
