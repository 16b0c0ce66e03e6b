"""A study: a queue of trials in an Optuna storage, beside what they leave.

The queue is the budget: every trial waits in it from the start, and workers claim one at a time. A trial changes hands
under the store's lock, and its owner is written beside it, so that a dead owner's trial can go back.
"""

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
from lorasweep.errors import ConfigError
from lorasweep.files import read_json
from lorasweep.search import samplers
from lorasweep.search.order import Line
from lorasweep.search.space import Space
from lorasweep.study import budget, lease, pruning, repeats, same_point, storage
from lorasweep.study.direction import upward
from lorasweep.study.drawing import BY_HAND, LEFT_OUT, Drawing, is_own, points
from lorasweep.study.meta import STUDY, Entry, StudyMeta, next_name, read_meta, search_spec, write_meta
from lorasweep.study.owners import Owners
from lorasweep.study.queue import LOOK_AT, Queue
from lorasweep.study.same_point import Identity
from lorasweep.study.settling import settled
from lorasweep.study.signals import Signals
from lorasweep.study.trial import Trial

optuna.logging.set_verbosity(optuna.logging.WARNING)

MOST_EVALUATIONS = 8
"""Evaluations of a trial that might have been its best on other rows."""
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
        self._store = storage.open_store(folder, meta.storage)
        self._optuna = _optuna_study(meta, self._store, len(self.search.objectives or []), create)
        self.queue = Queue(self._optuna, self._store, self.space, self.owner)
        self.signals = Signals(self._optuna, self._store, self.owner)
        watch = lease.Watch(self.search.lease_s)
        self.owners = Owners(folder, self.queue, self.signals, self._store, self.owner, watch)

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
        study.queue.enqueue(queue)
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

    @storage.patient
    def claim(self, shares: Callable[[list[str]], bool] | None = None) -> int | None:
        """Return the number of a waiting trial that nobody else has; None: none waits, those that do wait for others'
        results, or a budget is spent.

        `shares` tells of a trial's overrides whether its base is loaded: of the next trials, such a one goes first.
        """
        return self.queue.claim(lambda: self._may_begin(self._ready()), shares)

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

    @storage.patient
    def sharing(self) -> int:
        """Return how many workers share this machine: all while trials wait that may begin, then those that live and
        hold one, and this one.
        """
        return self.search.workers if self._may_begin(self.queue.ids(TrialState.WAITING)) else self.owners.here()

    @storage.patient
    def drawn(self, number: int, identity: Identity = same_point.identity) -> Trial:
        """Return a claimed trial, its point drawn now if it has none yet.

        Raises ConfigError where it cannot be, and KnownPoint where it would be another trial over again: it is left
        out then.
        """
        drawing = Drawing(self._optuna, self._store, self.search, self.space, self.spec, identity)
        trial = drawing.settled(self.queue.held(number), lambda: self.queue.ensure_ours(number))
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
        return budget.spent(
            self.search, self.trials, self.best, self.meta.maximize, self.signals.all().get("began"), self.cost
        )

    def cost(self) -> float:
        """Return what the workers' hours have cost so far; 0 without search.cost_per_hour."""
        spent_s = sum(sign.get("busy_s", 0.0) + sign.get("idle_s", 0.0) for sign in self.signals.workers().values())
        return spent_s / 3600 * (self.search.cost_per_hour or 0.0)

    @storage.patient
    def ready(self) -> int:
        """Return how many waiting trials may begin: none once a budget is spent, repeats alone in a settled study."""
        return len(self._ready())

    def _ready(self) -> list[int]:
        waiting = self.queue.ids(TrialState.WAITING)
        if not waiting or self.spent():
            return []
        if not self.settled():
            return waiting
        return [i for i in waiting if not repeats.is_searched(self.queue.by_id(i))]

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
        return budget.device_s(self.trials())

    @storage.patient
    def should_prune(self, number: int, total_steps: int, warmup_ratio: float = 0.0) -> bool:
        """Return whether the pruner ends the trial at the step it reported last."""
        return pruning.should_prune(
            self.queue.held(number),
            self._optuna,
            self.search,
            self.space,
            maximize=self.meta.maximize,
            total_steps=total_steps,
            warmup_ratio=warmup_ratio,
        )

    def begin(self) -> None:
        """Start the wall clock, forget an earlier `stop --all`, and write a damaged study.json again."""
        if read_json(self.folder / STUDY) is None:
            self._write_file()
        self.signals.begin()

    # --- what there is -----------------------------------------------------------------------------------------------

    @storage.patient
    def trials(self) -> list[FrozenTrial]:
        """Return this study's own trials."""
        return [t for t in self._optuna.get_trials(deepcopy=False) if is_own(t)]

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

    def best(self) -> FrozenTrial | None:
        """Return the complete trial with the best primary metric; of equals, the first.

        Where configurations ran with several seeds, the one that all runs together speak for, by its first trial.
        """
        return repeats.leader(self.trials(), self.meta.maximize)

    def run_again(self, found: repeats.Race, round_: Sequence[Entry]) -> list[int]:
        """Store a race and queue what of its next round is not there yet; return the new numbers."""
        with self._store.exclusive():
            self.signals.set_racing(found)
            there = repeats.repeats(self.trials())
            new = [e for e in round_ if e.repeat_of is None or e.repeat not in there.get(e.repeat_of, {})]
            return self.queue.enqueue(new)


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
