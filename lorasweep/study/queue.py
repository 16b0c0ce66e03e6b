"""The trials of a study in its store: added as waiting, claimed by one worker, reported and told by it.

A trial changes hands under the store's lock. Its owner is written beside it, so that a dead owner's trial can go back.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from lorasweep.errors import LostLease
from lorasweep.search import samplers
from lorasweep.search.order import ADDED
from lorasweep.search.space import Space
from lorasweep.study import repeats, storage
from lorasweep.study.lease import Owner
from lorasweep.study.meta import Entry
from lorasweep.study.result import STORED

MAY_BE_PRUNED = "may_be_pruned"
"""User attribute of a trial that a person added: whether the pruner may end it."""
LOOK_AT = 32
"""Waiting trials among which one is sought that shares what a worker has loaded."""


class Queue:
    """The queue of a study, as one worker sees it."""

    def __init__(self, study: optuna.Study, store: storage.Store, space: Space, owner: Owner) -> None:
        self._study = study
        self._store = store
        self._space = space
        self._owner = owner
        self._ids: dict[int, int] = {}
        """Number -> the store's id, of the trials that this worker has claimed."""

    def ids(self, state: TrialState) -> list[int]:
        """Return the ids of the trials in a state, by number."""
        return self._store.ids(self._study._study_id, state)

    def by_id(self, trial_id: int) -> FrozenTrial:
        return self._store.optuna.get_trial(trial_id)

    def held(self, number: int) -> FrozenTrial:
        """Return a trial that this worker has claimed."""
        return self.by_id(self._ids[number])

    def enqueue(self, queue: Sequence[Entry]) -> list[int]:
        """Add waiting trials; return their numbers."""
        space = samplers.distributions(self._space)
        numbers = []
        for entry in queue:
            attributes: dict[str, Any] = {"extra": entry.extra} if entry.extra else {}
            if entry.added:
                attributes |= {ADDED: True, MAY_BE_PRUNED: entry.may_be_pruned}
            if entry.start_from is not None:
                attributes["start_from"] = entry.start_from
            if entry.retry_of is not None:
                attributes["retry_of"] = entry.retry_of
            if entry.repeat_of is not None:
                attributes |= {"repeat_of": entry.repeat_of, "repeat": entry.repeat}
            inside = {k: v for k, v in entry.given.items() if k in space and samplers.holds(space[k], v)}
            if entry.baseline:
                attributes["baseline"] = entry.baseline
            if entry.overrides is not None:
                attributes |= {"overrides": entry.overrides, "swept": entry.given}
            frozen = optuna.create_trial(
                state=TrialState.WAITING,
                params=inside if entry.overrides is not None else {},
                distributions={k: space[k] for k in inside} if entry.overrides is not None else {},
                user_attrs=attributes,
                system_attrs={} if entry.overrides is not None else {"fixed_params": inside},
            )
            trial_id = self._store.optuna.create_new_trial(self._study._study_id, template_trial=frozen)
            numbers.append(self._store.optuna.get_trial_number_from_id(trial_id))
            if entry.added:
                self._study.set_user_attr(f"first:{trial_id}", True)
        return numbers

    def take_in(self, trials: Sequence[FrozenTrial], origin: str | None) -> list[int]:
        """Add ended trials of another study as far as their values lie in this space; return their new numbers.

        With an origin they serve the sampler alone; without, they are this study's own.
        """
        space = samplers.distributions(self._space)
        numbers = []
        for trial in trials:
            if not repeats.is_searched(trial):
                continue
            swept = trial.user_attrs.get("swept", trial.params)
            if trial.values is not None and len(trial.values) != len(self._study.directions):
                continue
            inside = {k: v for k, v in swept.items() if k in space and samplers.holds(space[k], v)}
            if not inside or not self._space.contains(inside):
                continue
            kept = ("reason", *STORED) if origin else ("reason", "point", *STORED)  # that stays true
            attributes = {k: v for k, v in trial.user_attrs.items() if k in kept}
            attributes |= {"swept": inside, "overrides": self._space.line(inside)} | (
                {"origin": origin} if origin else {}
            )
            frozen = optuna.create_trial(
                state=trial.state,
                values=trial.values,
                params=inside,
                distributions={k: space[k] for k in inside},
                user_attrs=attributes,
                intermediate_values=trial.intermediate_values,
            )
            trial_id = self._store.optuna.create_new_trial(self._study._study_id, template_trial=frozen)
            numbers.append(self._store.optuna.get_trial_number_from_id(trial_id))
        return numbers

    @storage.patient
    def claim(
        self, ready: Callable[[], Sequence[int]], shares: Callable[[list[str]], bool] | None = None
    ) -> int | None:
        """Return the number of a waiting trial that nobody else has; None: none waits, or a budget is spent.

        `shares` tells of a trial's overrides whether its base is loaded: of the next trials, such a one goes first.
        """
        with self._store.exclusive():
            trial_id = self._dropped_answer()
            if trial_id is None:
                waiting = ready()
                if not waiting:
                    return None
                first = self._store.optuna.get_study_user_attrs(self._study._study_id)
                trial_id = next((i for i in waiting if f"first:{i}" in first), None)
                if trial_id is None:
                    trial_id = self._alike(waiting[:LOOK_AT], shares)
                self._store.optuna.set_trial_state_values(trial_id, TrialState.RUNNING)
                self._store.optuna.set_trial_user_attr(trial_id, "owner", self._owner.to_dict())
        number = self.by_id(trial_id).number
        self._ids[number] = trial_id
        return number

    def _alike(self, waiting: Sequence[int], shares: Callable[[list[str]], bool] | None) -> int:
        """Return the first trial whose point is known and shares what is loaded, or else the first."""
        for trial_id in waiting if shares else ():
            known = self.by_id(trial_id).user_attrs
            if "overrides" in known and shares is not None and shares(known["overrides"]):
                return trial_id
        return waiting[0]

    def _dropped_answer(self) -> int | None:
        """Return a trial that is ours without our knowing: the database took a claim and the answer was lost."""
        for trial_id in self.ids(TrialState.RUNNING):
            if self._is_ours(self.by_id(trial_id)) and trial_id not in self._ids.values():
                return trial_id
        return None

    @storage.patient
    def report(self, number: int, step: int, value: float) -> None:
        """Store the primary metric at a step."""
        self._store.optuna.set_trial_intermediate_value(self._ids[number], step, value)

    @storage.patient
    def checkpointed(self, number: int, step: int) -> None:
        """Remember that a trial can go on from a step. Raises LostLease where it is no longer ours."""
        self.ensure_ours(number)
        self._store.optuna.set_trial_user_attr(self._ids[number], "checkpoint_step", step)

    @storage.patient
    def condemn(self, number: int, verdict: str) -> None:
        """Store why a trial is to end: a pruner asked again at the same step may answer otherwise."""
        self._store.optuna.set_trial_user_attr(self._ids[number], "verdict", verdict)

    @storage.patient
    def verdict(self, number: int) -> str:
        """Return what `condemn` stored, or nothing."""
        return self.held(number).user_attrs.get("verdict", "")

    @storage.patient
    def tell(self, number: int, state: str, values: Sequence[float] | None, attributes: Mapping[str, Any]) -> None:
        """End a trial as COMPLETE, PRUNED or FAIL. Raises LostLease where it is no longer ours."""
        with self._store.exclusive():
            if self._told(number, state):
                return
            self.ensure_ours(number)
            for key, entry in attributes.items():
                self._store.optuna.set_trial_user_attr(self._ids[number], key, entry)
            self._store.optuna.set_trial_state_values(self._ids[number], TrialState[state], values)

    def _told(self, number: int, state: str) -> bool:
        """Return whether the trial has ended so by us: the answer to an earlier call may have been lost."""
        trial = self.held(number)
        return trial.state == TrialState[state] and self._is_ours(trial)

    def _is_ours(self, trial: FrozenTrial) -> bool:
        return (trial.user_attrs.get("owner") or {}).get("name") == self._owner.name

    @storage.patient
    def give_back(self, number: int) -> None:
        """Put a trial of ours back into the queue; it goes on from its checkpoint."""
        with self._store.exclusive():
            self.ensure_ours(number)
            self.put_back(self._ids[number])

    @storage.patient
    def ensure_ours(self, number: int) -> None:
        """Raises LostLease where a trial is no longer ours."""
        trial = self.held(number)
        if trial.state != TrialState.RUNNING or not self._is_ours(trial):
            raise LostLease(f"trial {number} was given to another worker while this one gave no sign of life")

    def put_back(self, trial_id: int) -> None:
        self._store.optuna.set_trial_user_attr(trial_id, "owner", None)
        self._store.optuna.set_trial_state_values(trial_id, TrialState.WAITING)

    def end_waiting(self, number: int, reason: str) -> bool:
        """End a trial as PRUNED that has not begun; return whether it was waiting."""
        with self._store.exclusive():
            trial = self.by_id(
                self._store.optuna.get_trial_id_from_study_id_trial_number(self._study._study_id, number)
            )
            if trial.state != TrialState.WAITING:
                return False
            self._store.optuna.set_trial_user_attr(trial._trial_id, "reason", reason)
            self._store.optuna.set_trial_state_values(trial._trial_id, TrialState.RUNNING)
            self._store.optuna.set_trial_state_values(trial._trial_id, TrialState.PRUNED)
        return True

    @storage.patient
    def waiting(self) -> int:
        return len(self.ids(TrialState.WAITING))

    @storage.patient
    def running(self) -> int:
        return len(self.ids(TrialState.RUNNING))
