"""A study: a queue of trials in an Optuna storage, beside what they leave.

The queue is the budget: every trial waits in it from the start, and workers claim one at a time. A trial changes hands
under the store's lock, and its owner is written beside it, so that a dead owner's trial can go back.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.exceptions import DuplicatedStudyError
from optuna.trial import FrozenTrial, TrialState

from lorasweep.config import compose, trust
from lorasweep.config.overrides import overlaid
from lorasweep.config.spec import TrialSpec
from lorasweep.credentials import without_password
from lorasweep.errors import ConfigError, LostLease
from lorasweep.files import read_json
from lorasweep.hardware import container
from lorasweep.search import pruners, samplers
from lorasweep.search.order import ADDED, Line
from lorasweep.search.space import Space
from lorasweep.study import lease, repeats, same_point, storage
from lorasweep.study.direction import better, upward
from lorasweep.study.drawing import BY_HAND, LEFT_OUT, Drawing, points
from lorasweep.study.meta import STUDY, Entry, StudyMeta, next_name, read_meta, search_spec, write_meta
from lorasweep.study.result import RESULT, STORED
from lorasweep.study.same_point import Identity
from lorasweep.study.settling import settled
from lorasweep.study.trial import Trial

optuna.logging.set_verbosity(optuna.logging.WARNING)

MAY_BE_PRUNED = "may_be_pruned"
"""User attribute of a trial that a person added: whether the pruner may end it."""
MOST_EVALUATIONS = 8
"""Evaluations of a trial that might have been its best on other rows."""
LOOK_AT = 32
"""Waiting trials among which one is sought that shares what a worker has loaded."""
KEPT_SPECS = 8 * LOOK_AT
"""A trial that was looked at while it waited is composed already when its turn comes."""

if TYPE_CHECKING:
    from lorasweep.tasks.metric import Parts


class Study:
    """A study's folder and its queue. One object is one worker in the eyes of the others."""

    def __init__(self, folder: Path, meta: StudyMeta, *, create: bool = False, trusted: bool = False) -> None:
        self.folder = folder
        self.trusted = trusted or create
        """Whether its settings may run code: this command made it, or says so."""
        self.meta = meta
        self.owner = lease.me()
        self.space = Space.from_json(meta.space)
        self.search = search_spec(meta.search)
        self._compose = lru_cache(KEPT_SPECS)(compose.compose_trial)
        self._beats = 0
        self._watch = lease.Watch(self.search.lease_s)
        self._store = storage.open_store(folder, meta.storage)
        self._optuna = _optuna_study(meta, self._store, len(self.search.objectives or []), create)
        self._id = self._optuna._study_id
        self._ids: dict[int, int] = {}

    # --- making and opening ------------------------------------------------------------------------------------------

    @staticmethod
    def create(folder: Path, meta: StudyMeta, queue: Sequence[Entry], *, rename: bool = False) -> "Study":
        """Make the folder and fill the queue.

        Where a study of this name exists, `rename` takes the next free name, as for a name that the clock
        gave; else ConfigError is raised.
        """
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            if rename:
                name = next_name(meta.name)
                return Study.create(folder.with_name(name), replace(meta, name=name), queue, rename=True)
            raise ConfigError(
                [
                    f"study: {folder} is there already; go on with `python -m lorasweep resume {folder}`, or choose "
                    "another name with study=NAME"
                ]
            ) from None
        except OSError as error:
            raise ConfigError([f"outputs: cannot make {folder} ({error.strerror}); set outputs=FOLDER"]) from error
        try:
            study = Study(folder, meta, create=True)
        except ConfigError:
            folder.rmdir()
            raise
        study.enqueue(queue)
        study._write_meta()
        return study

    @staticmethod
    def open(folder: Path, *, trusted: bool = False) -> "Study":
        """Return the study in `folder`. Raises ConfigError if there is none."""
        return Study(folder, read_meta(folder), trusted=trusted)

    @staticmethod
    def join(url: str, name: str, outputs: Path, *, trusted: bool = False) -> "Study":
        """Return the study of a database; its folder is made here where this machine has none.

        Raises ConfigError where the database has no such study.
        """
        folder = outputs / name
        store = storage.open_store(folder, url)
        names = [s.study_name for s in store.optuna.get_all_studies()]
        if name not in names:
            known = ", ".join(names) or "none"
            raise ConfigError([f"study: the database has no study '{name}'; it has {known}"])
        attributes = store.optuna.get_study_user_attrs(store.optuna.get_study_id_from_name(name))
        if "meta" not in attributes:
            raise ConfigError([f"study: '{name}' was not made by lorasweep, or its making was cut short"])
        folder.mkdir(parents=True, exist_ok=True)
        meta = StudyMeta(**attributes["meta"])
        study = Study(folder, replace(meta, storage=without_password(url)), trusted=trusted)
        study._write_file()
        return study

    def set_parent(self, run_id: str | None) -> None:
        """Remember the MLflow run that holds the trials' runs."""
        self.meta = replace(self.meta, mlflow_parent=run_id)
        self._write_meta()

    def change_search(self, changed: Mapping[str, Any]) -> None:
        """Store other search keys, as `resume` takes them."""
        self.meta = replace(self.meta, search={**self.meta.search, **changed})
        self.search = search_spec(self.meta.search)
        self._write_meta()

    def change_data(self, data: list[dict[str, Any]]) -> None:
        """Store what the data are from now on."""
        self.meta = replace(self.meta, data=data)
        self._write_meta()

    def _write_meta(self) -> None:
        self._optuna.set_user_attr("meta", asdict(self.meta))
        self._write_file()

    def _write_file(self) -> None:
        write_meta(self.folder, self.meta)

    def spec(self, overrides: Sequence[str]) -> TrialSpec:
        """Return the spec of override strings, kept where this study is, wherever it was started."""
        elsewhere = tuple(o for o in overrides if not o.startswith("outputs="))
        found = self._compose(elsewhere)
        return replace(found if self.trusted else trust.without_code(found), outputs=str(self.folder.parent))

    def refuse_code(self) -> None:
        """Raise ConfigError where the study was not made here and its settings would run code."""
        if self.trusted:
            return
        lines = [t.user_attrs["overrides"] for t in self.trials() if "overrides" in t.user_attrs]
        lines += [self.space.line(point) for point in self.space.corners()]
        trust.refuse_code([self._compose(tuple(line)) for line in lines], self.folder)

    def first_spec(self, overrides: Sequence[str] = ()) -> TrialSpec:
        """Return the spec of a trial at one point of the space, for what all trials have in common."""
        return self.spec(overlaid(self.space.first_line(), overrides))

    def trial_folder(self, number: int) -> Path:
        return self.folder / str(number)

    # --- the queue ---------------------------------------------------------------------------------------------------

    def enqueue(self, queue: Sequence[Entry]) -> list[int]:
        """Add waiting trials; return their numbers."""
        space = samplers.distributions(self.space)
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
            trial_id = self._store.optuna.create_new_trial(self._id, template_trial=frozen)
            numbers.append(self._store.optuna.get_trial_number_from_id(trial_id))
            if entry.added:
                self._optuna.set_user_attr(f"first:{trial_id}", True)
        return numbers

    @storage.patient
    def claim(self, shares: Callable[[list[str]], bool] | None = None) -> int | None:
        """Return the number of a waiting trial that nobody else has; None: none waits, those that do wait for others'
        results, or a budget is spent.

        `shares` tells of a trial's overrides whether its base is loaded: of the next trials, such a one goes first.
        """
        with self._store.exclusive():
            trial_id = self._dropped_answer()
            if trial_id is None:
                waiting = self._may_begin(self._ready())
                if not waiting:
                    return None
                first = self._attributes()
                trial_id = next((i for i in waiting if f"first:{i}" in first), None)
                if trial_id is None:
                    trial_id = self._alike(waiting[:LOOK_AT], shares)
                self._store.optuna.set_trial_state_values(trial_id, TrialState.RUNNING)
                self._store.optuna.set_trial_user_attr(trial_id, "owner", self.owner.to_dict())
        number = self._store.optuna.get_trial(trial_id).number
        self._ids[number] = trial_id
        return number

    def _may_begin(self, waiting: Sequence[int]) -> list[int]:
        """Return which of the waiting trials need no result that is not there: those whose point is known, and the
        first one whose point is to be drawn, once those have ended that its draw sees.
        """
        trials = self._optuna.get_trials(deepcopy=False)
        following = self._line(trials).next()
        known = {t._trial_id for t in trials if "overrides" in t.user_attrs}
        return [i for i in waiting if i in known or (following is not None and i == following._trial_id)]

    def _line(self, trials: Sequence[FrozenTrial]) -> Line:
        return Line(trials, self.search, samplers.learns(self.search))

    @storage.patient
    def awaits_results(self) -> bool:
        """Return whether trials wait, and all of them for what others come to."""
        waiting = self._ready()
        return bool(waiting) and not self._may_begin(waiting)

    def _alike(self, waiting: Sequence[int], shares: Callable[[list[str]], bool] | None) -> int:
        """Return the first trial whose point is known and shares what is loaded, or else the first."""
        for trial_id in waiting if shares else ():
            known = self._store.optuna.get_trial(trial_id).user_attrs
            if "overrides" in known and shares is not None and shares(known["overrides"]):
                return trial_id
        return waiting[0]

    def _dropped_answer(self) -> int | None:
        """Return a trial that is ours without our knowing: the database took a claim and the answer was lost."""
        for trial_id in self._store.ids(self._id, TrialState.RUNNING):
            owner = self._store.optuna.get_trial(trial_id).user_attrs.get("owner") or {}
            if owner.get("name") == self.owner.name and trial_id not in self._ids.values():
                return trial_id
        return None

    @storage.patient
    def drawn(self, number: int, identity: Identity = same_point.identity) -> Trial:
        """Return a claimed trial, its point drawn now if it has none yet.

        Raises ConfigError where it cannot be, and KnownPoint where it would be another trial over again: it is left
        out then.
        """
        drawing = Drawing(self._optuna, self._store, self.search, self.space, self.spec, identity)
        trial = drawing.settled(self._store.optuna.get_trial(self._ids[number]), lambda: self.ensure_ours(number))
        known = trial.user_attrs
        return Trial(
            number,
            self.spec(known["overrides"]),
            known.get("start_from"),
            killed=known.get("killed", 0),
            is_suspect=known.get("deaths", 0) > 0,
            baseline=known.get("baseline", ""),
        )

    def left_out(self) -> list[str]:
        """Return why trials were not trained though they were asked for, a sentence each."""
        trials = self._optuna.get_trials(deepcopy=False)
        return [t.user_attrs[LEFT_OUT] for t in trials if LEFT_OUT in t.user_attrs]

    def twin(self, point: str) -> FrozenTrial | None:
        """Return the first trial that has a point, by its identity, and has it trained or will."""
        return points(self.trials(), BY_HAND).get(point)

    @storage.patient
    def spent(self) -> str:
        """Return which budget is used up, in words, or nothing."""
        budget = self.search
        if budget.wall_hours and time.time() - self._attributes().get("began", time.time()) > 3600 * budget.wall_hours:
            return f"search.wall_hours={budget.wall_hours:g} are over"
        if budget.device_hours and self.device_s() > 3600 * budget.device_hours:
            return f"search.device_hours={budget.device_hours:g} are used"
        if budget.max_cost is not None and self.cost() >= budget.max_cost:
            return f"search.max_cost={budget.max_cost:g} is spent"
        if budget.target is not None:
            best = self.best()
            if best is not None and not better(budget.target, best.values[0], self.meta.maximize):
                return f"search.target={budget.target:g} is reached by trial {best.number}"
        return ""

    def cost(self) -> float:
        """Return what the workers' hours have cost so far; 0 without search.cost_per_hour."""
        spent_s = sum(sign.get("busy_s", 0.0) + sign.get("idle_s", 0.0) for sign in self.workers().values())
        return spent_s / 3600 * (self.search.cost_per_hour or 0.0)

    @storage.patient
    def ready(self) -> int:
        """Return how many waiting trials may begin: none once a budget is spent, repeats alone in a settled study."""
        return len(self._ready())

    def _ready(self) -> list[int]:
        waiting = self._store.ids(self._id, TrialState.WAITING)
        if not waiting or self.spent():
            return []
        if not self.settled():
            return waiting
        return [i for i in waiting if not repeats.is_searched(self._store.optuna.get_trial(i))]

    def not_begun(self) -> str:
        """Return why trials that wait do not begin, or nothing."""
        return self.spent() or self.settled()

    @storage.patient
    def settled(self) -> str:
        """Return why the trials that wait could not change the answer by more than the margin, or nothing."""
        if self.search.stop != "when_settled":
            return ""
        return settled(self.trials(), self.search.margin, self.meta.bounds, self.meta.maximize)

    def device_s(self) -> float:
        """Return the seconds that ended trials held a device."""
        return sum(t.user_attrs.get("device_s", 0.0) for t in self.trials())

    # --- what the owner of a trial does ------------------------------------------------------------------------------

    @storage.patient
    def report(self, number: int, step: int, value: float) -> None:
        """Store the primary metric at a step."""
        self._store.optuna.set_trial_intermediate_value(self._ids[number], step, value)

    @storage.patient
    def should_prune(self, number: int, total_steps: int, warmup_ratio: float = 0.0) -> bool:
        """Return whether the pruner ends the trial at the step it reported last."""
        trial = self._store.optuna.get_trial(self._ids[number])
        looks = pruners.window(self.search, total_steps, warmup_ratio)
        is_the_searchs = repeats.is_searched(trial) and trial.user_attrs.get(MAY_BE_PRUNED, True)
        if not is_the_searchs or trial.last_step not in looks:
            return False
        line = self._line(self._optuna.get_trials(deepcopy=False))
        in_order = samplers.learns(self.search) and number in line
        seen = line.seen_by(number) if in_order else None
        searched = [t for t in self.trials() if repeats.is_searched(t)] if seen is None else seen
        rivals = [*searched, *(line.after(number) if in_order else ())]
        if pruners.is_spared(trial, rivals, self.search.min_complete, self.meta.maximize):
            return False
        if any(pruners.is_spared(trial, group, 1, self.meta.maximize) for group in self._asked_about(trial, searched)):
            return False
        pruner = pruners.make_pruner(self.search, total_steps, warmup_ratio)
        rungs = pruners.rungs(self.search, total_steps, warmup_ratio)
        return pruners.should_prune(pruner, self._optuna, trial, rungs, seen)

    def _asked_about(self, trial: FrozenTrial, trials: Sequence[FrozenTrial]) -> list[list[FrozenTrial]]:
        """Return for each key that search.question asks about the trials that have what a trial has for it."""
        asked = self.search.question if isinstance(self.search.question, list) else []
        dimensions = [d for d in self.space.dimensions if d.key in asked and d.key in trial.user_attrs["swept"]]
        groups = []
        for d in dimensions:
            own = d.part(trial.user_attrs["swept"][d.key])
            known = [t for t in trials if d.key in t.user_attrs.get("swept", {})]
            groups.append([t for t in known if d.part(t.user_attrs["swept"][d.key]) == own])
        return groups

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
        return self._store.optuna.get_trial(self._ids[number]).user_attrs.get("verdict", "")

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

    @storage.patient
    def give_back(self, number: int) -> None:
        """Put a trial of ours back into the queue; it goes on from its checkpoint."""
        with self._store.exclusive():
            self.ensure_ours(number)
            self._put_back(self._ids[number])

    def _told(self, number: int, state: str) -> bool:
        """Return whether the trial has ended so by us: the answer to an earlier call may have been lost."""
        trial = self._store.optuna.get_trial(self._ids[number])
        owner = trial.user_attrs.get("owner") or {}
        return trial.state == TrialState[state] and owner.get("name") == self.owner.name

    @storage.patient
    def ensure_ours(self, number: int) -> None:
        """Raises LostLease where a trial is no longer ours."""
        trial = self._store.optuna.get_trial(self._ids[number])
        owner = trial.user_attrs.get("owner") or {}
        if trial.state != TrialState.RUNNING or owner.get("name") != self.owner.name:
            raise LostLease(f"trial {number} was given to another worker while this one gave no sign of life")

    def _put_back(self, trial_id: int) -> None:
        self._store.optuna.set_trial_user_attr(trial_id, "owner", None)
        self._store.optuna.set_trial_state_values(trial_id, TrialState.WAITING)

    # --- signs of life -----------------------------------------------------------------------------------------------

    @storage.patient
    def beat(
        self, progress: Mapping[int, Mapping[str, float]], busy_s: float, idle_s: float, began: float | None = None
    ) -> None:
        """Give a sign of life, with how far each trial of ours is, the seconds with and without one so far, and when
        the first one began.
        """
        self._beats += 1
        shown = {str(n): dict(p) for n, p in progress.items()}
        spent = {"busy_s": round(busy_s, 3), "idle_s": round(idle_s, 3)}
        sign = {"beat": self._beats, "trials": shown, "host": self.owner.host, **spent}
        sign |= {"began": began, "at": time.time()}
        sign["oom_kills"] = container.oom_kills()
        self._optuna.set_user_attr(f"worker:{self.owner.name}", sign)

    @storage.patient
    def reclaim(self) -> list[int]:
        """Put the trials of dead owners back; return those given up, whose owners died too often without progress.

        Progress is a step further than at the last death: a kill from outside is not a trial's fault.
        """
        given_up = []
        for trial_id in self._store.ids(self._id, TrialState.RUNNING):
            if not self._orphaned(trial_id):
                continue
            with self._store.exclusive():
                if self._orphaned(trial_id) and self._bury(trial_id):
                    given_up.append(self._store.optuna.get_trial_number_from_id(trial_id))
        return given_up

    def _orphaned(self, trial_id: int) -> bool:
        trial = self._store.optuna.get_trial(trial_id)
        if trial.state != TrialState.RUNNING:
            return False
        owner = trial.user_attrs.get("owner")
        beat = self._attributes().get(f"worker:{owner['name']}", {}).get("beat", 0) if owner else 0
        return self._watch.dead(owner, beat)

    def _bury(self, trial_id: int) -> bool:
        """Put a dead owner's trial back, or fail it; return whether it failed."""
        trial = self._store.optuna.get_trial(trial_id)
        attributes = trial.user_attrs
        if (self.trial_folder(trial.number) / RESULT).exists():  # it has ended: the next owner only tells it
            self._put_back(trial_id)
            return False
        sign = self._attributes().get(f"worker:{(attributes.get('owner') or {}).get('name')}", {})
        running = sign.get("trials", {})
        self._store.optuna.set_trial_user_attr(trial_id, "killed", attributes.get("killed", 0) + 1)
        if running and str(trial.number) not in running:  # it was claimed, others ran
            self._put_back(trial_id)
            return False
        reached = max(attributes.get("checkpoint_step", 0), running.get(str(trial.number), {}).get("step", 0))
        deaths = 0 if reached > attributes.get("step_at_death", 0) else attributes.get("deaths", 0) + 1
        self._store.optuna.set_trial_user_attr(trial_id, "deaths", deaths)
        self._store.optuna.set_trial_user_attr(trial_id, "step_at_death", reached)
        for_memory = lease.is_here(sign.get("host", "")) and container.oom_kills() > sign.get("oom_kills", 0)
        if deaths <= (min(1, self.search.max_retries) if for_memory else self.search.max_retries):
            self._put_back(trial_id)
            return False
        reason = f"its workers died {deaths} times without getting further than step {reached}"
        if for_memory:
            reason = f"out of memory: the kernel killed its worker {deaths} times at step {reached}"
        self._store.optuna.set_trial_user_attr(trial_id, "reason", reason)
        self._store.optuna.set_trial_state_values(trial_id, TrialState.FAIL)
        return True

    # --- steering ----------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Start the wall clock, forget an earlier `stop --all`, and write a damaged study.json again."""
        if read_json(self.folder / STUDY) is None:
            self._write_file()
        if "began" not in self._attributes():
            self._optuna.set_user_attr("began", time.time())
        self._optuna.set_user_attr("stop:all", None)

    def warmed(self) -> bool:
        """Return whether search.warm_start has been done."""
        return bool(self._attributes().get("warmed"))

    def set_warmed(self) -> None:
        self._optuna.set_user_attr("warmed", True)

    def stop(self, number: int | None, reason: str) -> None:
        """Ask the workers to end one trial as PRUNED, or all of them to stop as after Ctrl-C."""
        self._optuna.set_user_attr("stop:all" if number is None else f"stop:{number}", reason)

    @storage.patient
    def stops(self) -> dict[str, str]:
        """Return what was asked to stop, `all` or a trial's number, with the reason."""
        found = self._attributes().items()
        return {k.removeprefix("stop:"): v for k, v in found if k.startswith("stop:") and v}

    def end_waiting(self, number: int, reason: str) -> bool:
        """End a trial as PRUNED that has not begun; return whether it was waiting."""
        with self._store.exclusive():
            trial = self.trial(number)
            if trial.state != TrialState.WAITING:
                return False
            self._store.optuna.set_trial_user_attr(trial._trial_id, "reason", reason)
            self._store.optuna.set_trial_state_values(trial._trial_id, TrialState.RUNNING)
            self._store.optuna.set_trial_state_values(trial._trial_id, TrialState.PRUNED)
        return True

    def take_in(self, trials: Sequence[FrozenTrial], origin: str | None) -> list[int]:
        """Add ended trials of another study as far as their values lie in this space; return their new numbers.

        With an origin they serve the sampler alone; without, they are this study's own.
        """
        space = samplers.distributions(self.space)
        numbers = []
        for trial in trials:
            if not repeats.is_searched(trial):
                continue
            swept = trial.user_attrs.get("swept", trial.params)
            if trial.values is not None and len(trial.values) != len(self._optuna.directions):
                continue
            inside = {k: v for k, v in swept.items() if k in space and samplers.holds(space[k], v)}
            if not inside or not self.space.contains(inside):
                continue
            kept = ("reason", *STORED) if origin else ("reason", "point", *STORED)  # that stays true
            attributes = {k: v for k, v in trial.user_attrs.items() if k in kept}
            attributes |= {"swept": inside, "overrides": self.space.line(inside)} | (
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
            trial_id = self._store.optuna.create_new_trial(self._id, template_trial=frozen)
            numbers.append(self._store.optuna.get_trial_number_from_id(trial_id))
        return numbers

    # --- what there is -----------------------------------------------------------------------------------------------

    def _attributes(self) -> dict[str, Any]:
        return self._store.optuna.get_study_user_attrs(self._id)

    def workers(self) -> dict[str, dict[str, Any]]:
        """Return the last sign of life of every worker, by name."""
        return {k.removeprefix("worker:"): v for k, v in self._attributes().items() if k.startswith("worker:")}

    @storage.patient
    def trials(self) -> list[FrozenTrial]:
        """Return this study's own trials."""
        found = self._optuna.get_trials(deepcopy=False)
        return [t for t in found if "origin" not in t.user_attrs and LEFT_OUT not in t.user_attrs]

    def scores(self, number: int, split: str = "eval") -> "Parts | None":
        """Return what each example of the eval or test split adds to a trial's metric; None where there is nothing."""
        from lorasweep.study import example_scores  # loads the tasks, which a look at the queue does without

        name = example_scores.TEST_NAME if split == "test" else example_scores.NAME
        return example_scores.read(self.trial_folder(number), name)

    def evaluations(self, number: int, least: float) -> "list[Parts]":
        """Return the same of a trial's evaluations on the eval split: the best few of those that are at least as good
        as `least`, where more is better.
        """
        from lorasweep.study import example_scores

        values = {step: upward(v, self.meta.maximize) for step, v in self.trial(number).intermediate_values.items()}
        steps = sorted((step for step in values if values[step] >= least), key=lambda step: (-values[step], step))
        return example_scores.read_evaluations(self.trial_folder(number), steps[:MOST_EVALUATIONS])

    @storage.patient
    def trial(self, number: int) -> FrozenTrial:
        """Raises ConfigError where there is no such trial."""
        found = {t.number: t for t in self.trials()}
        if number not in found:
            has = f"0 to {max(found)}" if found else "none yet"
            raise ConfigError([f"trial {number}: {self.meta.name} has no such trial; it has {has}"])
        return found[number]

    def failed(self) -> list[FrozenTrial]:
        """Return the failed trials that no later one has made up for."""
        trials = self.trials()
        redone = {t.user_attrs.get("retry_of") for t in trials if t.state != TrialState.FAIL}
        return [t for t in trials if t.state == TrialState.FAIL and t.number not in redone]

    @storage.patient
    def waiting(self) -> int:
        return len(self._store.ids(self._id, TrialState.WAITING))

    @storage.patient
    def alive(self) -> int:
        """Return how many workers hold a trial and live."""
        return len({owner.get("name") for owner in self._living()})

    def _living(self) -> list[dict[str, Any]]:
        """Return the owner of each running trial, where it lives."""
        ids = [i for i in self._store.ids(self._id, TrialState.RUNNING) if not self._orphaned(i)]
        return [self._store.optuna.get_trial(i).user_attrs.get("owner") or {} for i in ids]

    @storage.patient
    def sharing(self) -> int:
        """Return how many workers share this machine: all while trials wait that may begin, then those that live and
        hold one, and this one.
        """
        if self._may_begin(self._store.ids(self._id, TrialState.WAITING)):
            return self.search.workers
        here = {owner["name"] for owner in self._living() if owner.get("host") == self.owner.host}
        return len(here | {self.owner.name})

    @storage.patient
    def running(self) -> int:
        return len(self._store.ids(self._id, TrialState.RUNNING))

    def best(self) -> FrozenTrial | None:
        """Return the complete trial with the best primary metric; of equals, the first.

        Where configurations ran with several seeds, the one that all runs together speak for, by its first trial.
        """
        return repeats.leader(self.trials(), self.meta.maximize)

    def racing(self) -> repeats.Race:
        """Return which trials run again with other seeds."""
        return repeats.Race.from_dict(self._attributes().get("race"))

    def run_again(self, found: repeats.Race, round_: Sequence[Entry]) -> list[int]:
        """Store a race and queue what of its next round is not there yet; return the new numbers."""
        with self._store.exclusive():
            self._optuna.set_user_attr("race", found.to_dict())
            there = repeats.repeats(self.trials())
            new = [e for e in round_ if e.repeat_of is None or e.repeat not in there.get(e.repeat_of, {})]
            return self.enqueue(new)


def _optuna_study(meta: StudyMeta, store: storage.Store, more_objectives: int, create: bool) -> optuna.Study:
    kind = optuna.study.StudyDirection
    first = kind.MAXIMIZE if meta.maximize else kind.MINIMIZE
    if not create:
        return optuna.load_study(study_name=meta.name, storage=store.optuna)
    try:
        return optuna.create_study(
            study_name=meta.name, storage=store.optuna, directions=[first] + [kind.MINIMIZE] * more_objectives
        )
    except DuplicatedStudyError:
        raise ConfigError([f"study: the database has a study '{meta.name}' already; choose another name"]) from None
