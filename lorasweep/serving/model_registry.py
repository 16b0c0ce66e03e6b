"""The winner in MLflow: logged as a model, and its place in the model registry."""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lorasweep.config.spec import TrialSpec
from lorasweep.credentials import redact
from lorasweep.errors import ConfigError, MlflowDown, MlflowRefused
from lorasweep.files import read_json, replace_file
from lorasweep.serving import mlflow_model, winner
from lorasweep.study import answer, comparison, example_scores, significance
from lorasweep.study.belief import near_enough
from lorasweep.study.comparison import Rivals
from lorasweep.study.direction import upward
from lorasweep.study.study import Study
from lorasweep.tasks.metric import Parts
from lorasweep.tracking import outbox, runs
from lorasweep.tracking.mlflow_store import Mirror

CHAMPION, CHALLENGER = "champion", "challenger"
TAG = "lorasweep."
NORMAL_95 = 1.96
"""Standard errors to each side of a 95 % interval."""


# --- a study's winner ------------------------------------------------------------------------------------------------


NOT_LOGGED = "the model was not logged"
"""How the answer of `log_winner` begins where MLflow does not have the model."""


def log_winner(study: Study, spec: TrialSpec) -> str:
    """Log the winner as an MLflow model, register it where `tracking.register` asks for that; return what was done.

    "" where nothing was asked for, or it was done before. A study does not fail by MLflow: what went wrong is told.
    """
    track = spec.tracking
    best = study.best()
    if not track.enabled or best is None or not (track.log_model or track.register):
        return ""
    try:
        number = winner.pick(study, best.number)
        return Registry(runs.store_uri(spec)).put(study, number, track.experiment, track.register)
    except (MlflowDown, MlflowRefused, ConfigError, OSError) as error:
        return f"{NOT_LOGGED}: {redact(str(error))}"


class Registry(Mirror):
    """The models of a store."""

    def put(self, study: Study, number: int, experiment: str, name: str | None) -> str:
        """Log a trial as a model, and register it under `name`, each once; return what was done, "" for nothing."""
        folder = study.trial_folder(number)
        path = study.folder / "model.json"
        note = read_json(path) or {}
        if (note.get("uri"), note.get("trial")) != (self._here, number):
            note = {
                "uri": self._here,
                "trial": number,
                "model_id": self._model(folder, experiment, study.trusted),
                "registered": "",
            }
            replace_file(path, json.dumps(note, indent=1))
        elif note["registered"] == (name or note["registered"]):
            return ""
        told = f"model in MLflow: models:/{note['model_id']}"
        if name:
            told += f"\n{self._register(name, note['model_id'], study, number)}"
            replace_file(path, json.dumps(note | {"registered": name}, indent=1))
        return told

    def _model(self, folder: Path, experiment: str, trusted: bool) -> str:
        """Return the id of a new model that holds the trial's adapter and settings."""
        from mlflow.entities import LoggedModelOutput

        run = outbox.load(folder)
        run_id = run.run_id if run and run.uri == self._here else None
        with tempfile.TemporaryDirectory() as place:
            saved = Path(place) / "model"
            mlflow_model.save(folder, saved, folder.parent.parent / mlflow_model.BASES, trusted=trusted)
            model = self._ask("create_logged_model", self._experiment(experiment), "model", run_id)
            self._ask("log_model_artifacts", model.model_id, str(saved))
        self._ask("finalize_logged_model", model.model_id, "READY")
        if run_id:
            self._ask("log_outputs", run_id, [LoggedModelOutput(model.model_id, 0)])
        return str(model.model_id)

    def _register(self, name: str, model_id: str, study: Study, number: int) -> str:
        """Make a version of a registered model, and give it an alias; return what was done, and why."""
        try:
            self._ask("get_registered_model", name)
        except MlflowRefused:
            self._ask("create_registered_model", name)
        score = Score.of(study, number)
        model = self._ask("get_logged_model", model_id)
        version = self._ask(
            "create_model_version",
            name,
            model.artifact_location,
            model.source_run_id,
            score.tags(),
            await_creation_for=0,
            model_id=model_id,
        ).version
        alias, why = CHAMPION, "the first"
        try:
            champion = self._ask("get_model_version_by_alias", name, CHAMPION)
        except MlflowRefused:
            champion = None
        if champion is not None:
            better, why = score.beats(Score.from_tags(champion.tags))
            alias = CHAMPION if better else CHALLENGER
        self._ask("set_registered_model_alias", name, alias, version)
        return f"registered as {name} version {version}, {alias}: {why}"


# --- champion or challenger ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """How good a version is, and where its evidence lies."""

    metric: str
    value: float
    maximize: bool
    standard_error: float | None
    """None where no example has a part in the metric."""
    fingerprint: str
    """Of the data."""
    folders: list[str]
    """Of the runs that make the value, on the machine that made them: the trial's, or its repeats'."""
    margin: float = 0.0
    """By how much a challenger has to be shown to be better."""
    tested: str = ""
    """Folder of the registered adapter's answers to the test split."""

    @staticmethod
    def of(study: Study, number: int) -> "Score":
        found = next(c for c in answer.answer(study).candidates if c.number == number)
        fingerprint = winner.result(study, number).data_fingerprint
        folders = [str(study.trial_folder(n)) for n in found.scored]
        margin = near_enough(study.search.margin, study.meta.bounds, found.value)
        meta = study.meta
        tested = str(study.trial_folder(number))
        return Score(
            meta.metric, found.value, meta.maximize, found.standard_error, fingerprint, folders, margin, tested
        )

    def tags(self) -> dict[str, str]:
        return {f"{TAG}{k}": redact(json.dumps(v)) for k, v in vars(self).items()}

    @staticmethod
    def from_tags(tags: dict[str, str]) -> "Score | None":
        """Return what a version's tags say, None for a version that lorasweep did not make."""
        try:
            later = {"tested": json.loads(tags.get(f"{TAG}tested", '""'))}  # versions of before do not say it
            own = {k: json.loads(tags[f"{TAG}{k}"]) for k in Score.__dataclass_fields__ if k not in ("margin", *later)}
            return Score(**own, **later)
        except KeyError:
            return None

    def beats(self, champion: "Score | None") -> tuple[bool, str]:
        """Return whether this one is shown to be better than the champion by more than the margin, in words too.

        On the test split, which chose neither of them; on the eval split where a version has no answers to the other.
        """
        if champion is None:
            return False, "the champion has no score of lorasweep's to compare with"
        if (self.metric, self.maximize) != (champion.metric, champion.maximize):
            return False, f"the champion is judged by {champion.metric}, this one by {self.metric}"
        interval = self._on_the_test_split(champion) or self._same_examples(champion) or self._apart(champion)
        by = f"{self.metric} {self.value:.4f}, the champion's {champion.value:.4f}"
        if interval is None:
            return False, f"{by}; their noise is not known"
        better = interval.low > self.margin
        sure = f"{'shown' if better else 'not shown'} to be better by more than {self.margin:.4f}"
        return better, f"{by}, {sure} (better by {interval}, 95 %)"

    def _same_examples(self, champion: "Score") -> significance.Interval | None:
        """Return by how much this one is better on the same examples; None where they differ or are gone."""
        if self.fingerprint != champion.fingerprint:
            return None
        ours, theirs = self._parts(), champion._parts()
        if len(ours) < len(self.folders) or len(theirs) < len(champion.folders):
            return None
        if len({significance.examples(s) for s in [*ours, *theirs]}) != 1:
            return None
        return self._ahead(ours, theirs, np.array([self.value, champion.value]))

    def _on_the_test_split(self, champion: "Score") -> significance.Interval | None:
        """Return by how much the adapter is better on test examples; None where they differ or are gone."""
        if self.fingerprint != champion.fingerprint or not self.tested or not champion.tested:
            return None
        ours, theirs = (example_scores.read(Path(s.tested), example_scores.TEST_NAME) for s in (self, champion))
        if ours is None or theirs is None or significance.examples(ours) != significance.examples(theirs):
            return None
        return self._ahead([ours], [theirs], np.array([ours.value, theirs.value]))

    def _ahead(self, ours: list[Parts], theirs: list[Parts], values_K: np.ndarray) -> significance.Interval:
        """Return by how much ours are better: 95 %, paired over their examples."""
        significance.resample([*ours, *theirs])
        replicates_KR = np.stack([significance.mean_replicates(ours), significance.mean_replicates(theirs)])
        rivals = Rivals(upward(values_K, self.maximize), upward(replicates_KR, self.maximize))
        _, low, high = comparison.difference_interval(rivals, 0, 1)
        return significance.Interval(low, high)

    def _parts(self) -> list[Parts]:
        found = (example_scores.read(Path(f)) for f in self.folders)
        return [s for s in found if s is not None]

    def _apart(self, champion: "Score") -> significance.Interval | None:
        """Return by how much this one is better, from the standard errors of both."""
        if self.standard_error is None or champion.standard_error is None:
            return None
        half = NORMAL_95 * (self.standard_error**2 + champion.standard_error**2) ** 0.5
        ahead = upward(self.value - champion.value, self.maximize)
        return significance.Interval(ahead - half, ahead + half)
