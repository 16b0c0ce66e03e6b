"""Which workers of a study live, and what becomes of the trials of dead ones."""

from pathlib import Path
from typing import Any

from optuna.trial import TrialState

from lorasweep.hardware import container
from lorasweep.study import lease, storage
from lorasweep.study.lease import Owner, Watch
from lorasweep.study.queue import Queue
from lorasweep.study.result import RESULT
from lorasweep.study.signals import Signals


class Owners:
    """The workers that hold trials, as another of them sees them."""

    def __init__(
        self, folder: Path, queue: Queue, signals: Signals, store: storage.Store, me: Owner, watch: Watch
    ) -> None:
        self._folder = folder
        self._queue = queue
        self._signals = signals
        self._store = store
        self._owner = me
        self._watch = watch

    @storage.patient
    def reclaim(self, max_retries: int) -> list[int]:
        """Put the trials of dead owners back; return those given up, whose owners died too often without progress.

        Progress is a step further than at the last death: a kill from outside is not a trial's fault.
        """
        given_up = []
        for trial_id in self._queue.ids(TrialState.RUNNING):
            if not self._orphaned(trial_id):
                continue
            with self._store.exclusive():
                if self._orphaned(trial_id) and self._bury(trial_id, max_retries):
                    given_up.append(self._store.optuna.get_trial_number_from_id(trial_id))
        return given_up

    def _orphaned(self, trial_id: int) -> bool:
        trial = self._queue.by_id(trial_id)
        if trial.state != TrialState.RUNNING:
            return False
        owner = trial.user_attrs.get("owner")
        beat = self._signals.all().get(f"worker:{owner['name']}", {}).get("beat", 0) if owner else 0
        return self._watch.dead(owner, beat)

    def _bury(self, trial_id: int, max_retries: int) -> bool:
        """Put a dead owner's trial back, or fail it; return whether it failed."""
        trial = self._queue.by_id(trial_id)
        attributes = trial.user_attrs
        if (self._folder / str(trial.number) / RESULT).exists():  # it has ended: the next owner only tells it
            self._queue.put_back(trial_id)
            return False
        sign = self._signals.all().get(f"worker:{(attributes.get('owner') or {}).get('name')}", {})
        running = sign.get("trials", {})
        self._store.optuna.set_trial_user_attr(trial_id, "killed", attributes.get("killed", 0) + 1)
        if running and str(trial.number) not in running:  # it was claimed, others ran
            self._queue.put_back(trial_id)
            return False
        reached = max(attributes.get("checkpoint_step", 0), running.get(str(trial.number), {}).get("step", 0))
        deaths = 0 if reached > attributes.get("step_at_death", 0) else attributes.get("deaths", 0) + 1
        self._store.optuna.set_trial_user_attr(trial_id, "deaths", deaths)
        self._store.optuna.set_trial_user_attr(trial_id, "step_at_death", reached)
        for_memory = lease.is_here(sign.get("host", "")) and container.oom_kills() > sign.get("oom_kills", 0)
        if deaths <= (min(1, max_retries) if for_memory else max_retries):
            self._queue.put_back(trial_id)
            return False
        reason = f"its workers died {deaths} times without getting further than step {reached}"
        if for_memory:
            reason = f"out of memory: the kernel killed its worker {deaths} times at step {reached}"
        self._store.optuna.set_trial_user_attr(trial_id, "reason", reason)
        self._store.optuna.set_trial_state_values(trial_id, TrialState.FAIL)
        return True

    @storage.patient
    def alive(self) -> int:
        """Return how many workers hold a trial and live."""
        return len({owner.get("name") for owner in self._living()})

    def _living(self) -> list[dict[str, Any]]:
        """Return the owner of each running trial, where it lives."""
        ids = [i for i in self._queue.ids(TrialState.RUNNING) if not self._orphaned(i)]
        return [self._queue.by_id(i).user_attrs.get("owner") or {} for i in ids]

    @storage.patient
    def here(self) -> int:
        """Return how many workers of this machine live and hold a trial, this one counted in."""
        names = {owner["name"] for owner in self._living() if owner.get("host") == self._owner.host}
        return len(names | {self._owner.name})
