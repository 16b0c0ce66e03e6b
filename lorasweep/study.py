"""A study: a queue of trials in an Optuna journal, beside what they leave. The owner of Optuna.

The queue is the budget: every point of a grid waits in it from the start, and a worker claims one at a time.
"""

import fcntl
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal._file import BaseJournalFileLock
from optuna.trial import FrozenTrial, TrialState

from lorasweep.errors import ConfigError

optuna.logging.set_verbosity(optuna.logging.WARNING)


class FileLock(BaseJournalFileLock):
    """A lock the system frees when its holder dies; Optuna's own stalls for 30 s then."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._handle = -1

    def acquire(self) -> bool:
        self._handle = os.open(self._path, os.O_CREAT | os.O_RDWR)
        fcntl.flock(self._handle, fcntl.LOCK_EX)
        return True

    def release(self) -> None:
        fcntl.flock(self._handle, fcntl.LOCK_UN)
        os.close(self._handle)


@dataclass(frozen=True)
class StudyMeta:
    """What study.json holds."""

    name: str
    swept: list[str]
    """Keys that vary."""
    overrides: list[str]
    """What the study was started with."""
    metric: str
    maximize: bool
    mlflow_parent: str | None
    created: str


@dataclass(frozen=True)
class Claimed:
    """A trial that is ours to run."""

    number: int
    overrides: list[str]
    params: dict[str, Any]


class Study:
    """A study's folder and its queue."""

    def __init__(self, folder: Path, meta: StudyMeta) -> None:
        self.folder = folder
        self.meta = meta
        lock = FileLock(folder / "journal.lock")
        self._storage = JournalStorage(JournalFileBackend(str(folder / "journal.log"), lock_obj=lock))
        self._optuna = optuna.create_study(
            study_name=meta.name,
            storage=self._storage,
            direction="maximize" if meta.maximize else "minimize",
            load_if_exists=True,
        )
        self._ids: dict[int, int] = {}

    @staticmethod
    def create(
        folder: Path, meta: StudyMeta, points: Sequence[Mapping[str, Any]], lines: Sequence[Sequence[str]]
    ) -> "Study":
        """Make the folder and fill the queue: `points` are the swept values, `lines` the overrides of each trial.

        Raises ConfigError where a study of this name is there already.
        """
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            raise ConfigError([f"study: {folder} is there already; choose another name with study=NAME"]) from None
        except OSError as error:
            raise ConfigError([f"outputs: cannot make {folder} ({error.strerror}); set outputs=FOLDER"]) from error
        study = Study(folder, meta)
        study._write_meta()
        space = _distributions(points)
        for point, overrides in zip(points, lines, strict=True):
            study._optuna.add_trial(
                optuna.create_trial(
                    state=TrialState.WAITING,
                    params=dict(point),
                    distributions=space,
                    user_attrs={"overrides": list(overrides)},
                )
            )
        return study

    @staticmethod
    def open(folder: Path) -> "Study":
        """Return the study in `folder`. Raises ConfigError if there is none."""
        try:
            meta = json.loads((folder / "study.json").read_text(encoding="utf8"))
        except FileNotFoundError:
            raise ConfigError([f"{folder}: no study here (it has no study.json)"]) from None
        return Study(folder, StudyMeta(**meta))

    def set_parent(self, run_id: str | None) -> None:
        """Remember the MLflow run that holds the trials' runs."""
        self.meta = replace(self.meta, mlflow_parent=run_id)
        self._write_meta()

    def _write_meta(self) -> None:
        (self.folder / "study.json").write_text(json.dumps(asdict(self.meta), indent=1), encoding="utf8")

    def claim(self) -> Claimed | None:
        """Return a waiting trial that no other worker has, or None when the queue is empty."""
        for trial in self._optuna.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            try:
                ours = self._storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING)
            except UpdateFinishedTrialError:
                continue
            if ours:
                self._ids[trial.number] = trial._trial_id
                return Claimed(trial.number, list(trial.user_attrs["overrides"]), dict(trial.params))
        return None

    def report(self, number: int, step: int, value: float) -> None:
        """Store the primary metric at a step."""
        self._storage.set_trial_intermediate_value(self._ids[number], step, value)

    def tell(self, number: int, state: str, value: float | None, attributes: Mapping[str, Any]) -> None:
        """End a trial as COMPLETE, PRUNED or FAIL."""
        for key, entry in attributes.items():
            self._storage.set_trial_user_attr(self._ids[number], key, entry)
        values = [value] if value is not None else None
        self._storage.set_trial_state_values(self._ids[number], TrialState[state], values)

    def trials(self) -> list[FrozenTrial]:
        return self._optuna.get_trials(deepcopy=False)

    def best(self) -> FrozenTrial | None:
        """Return the complete trial with the best value; of equals, the first."""
        done = [t for t in self.trials() if t.state == TrialState.COMPLETE and t.value is not None]
        sign = -1 if self.meta.maximize else 1
        return min(done, key=lambda t: (sign * (t.value or 0.0), t.number), default=None)

    def trial_folder(self, number: int) -> Path:
        return self.folder / str(number)


def new_name(swept: Sequence[str]) -> str:
    """Return a study's name from the time and what it sweeps."""
    return "-".join([time.strftime("%Y%m%d-%H%M%S"), *swept])[:100].replace("/", "_")


def _distributions(points: Sequence[Mapping[str, Any]]) -> dict[str, BaseDistribution]:
    keys = points[0] if points else {}
    return {key: CategoricalDistribution(list(dict.fromkeys(p[key] for p in points))) for key in keys}
